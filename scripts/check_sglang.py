#!/usr/bin/env python3
"""Which of the names that this package relies on have moved in a release of SGLang.

    python scripts/check_sglang.py 0.5.24     # a release from the package index
    python scripts/check_sglang.py --write    # the contract of the installed one, anew

A release is read as text from its wheel: nothing of it is installed or run. It is compared with the
newest supported release that is not newer, and the exit status is 1 where something moved.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import sglang_batchllm
from names_used import names_used
from sglang_source import SGLangSource

CONTRACTS = Path(__file__).resolve().parent.parent / "test" / "edge" / "contracts"

Contract = dict[str, str]
"""What each name is, as `SGLangSource.describe` says it."""


def contract_of(release: str) -> Contract:
    """The contract of a supported release."""
    return json.loads((CONTRACTS / f"{release}.json").read_text(encoding="utf-8"))


def moved(contract: Contract, source: SGLangSource) -> dict[str, tuple[str, str | None]]:
    """Names that are not what they were: what each was, and what it is, None for nothing."""
    found = {name: source.describe(f"sglang.{name}") for name in contract}
    return {name: (was, found[name]) for name, was in contract.items() if found[name] != was}


def base_of(release: str) -> str:
    """The supported release to compare with."""
    older = [one for one in sglang_batchllm.SGLANG_VERSIONS if _numbers(one) <= _numbers(release)]
    return older[-1] if older else sglang_batchllm.SGLANG_VERSIONS[0]


def _numbers(release: str) -> list[int]:
    return [int(part) for part in release.split(".")[:3]]


def download(release: str, folder: Path) -> SGLangSource:
    """The source in the wheel of a release. Raises SystemExit where there is none."""
    wanted = f"sglang=={release}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", str(folder), wanted], check=False)
    wheels = [*folder.glob("*.whl")]
    if done.returncode or not wheels:
        sys.exit(f"error: pip finds no wheel of {wanted}; see its message above")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith(".py")])
    return SGLangSource(folder)


def write_contract() -> None:
    """The contract of the installed release."""
    release, source = version("sglang"), SGLangSource.installed()
    used = sorted(names_used(release, source))
    described = {name: source.describe(f"sglang.{name}") for name in used}
    missing = [name for name, description in described.items() if description is None]
    if missing:
        sys.exit(f"error: SGLang {release} has no {', '.join(missing)}")
    text = json.dumps(described, indent=0) + "\n"
    (CONTRACTS / f"{release}.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("releases", nargs="*", metavar="release", help="of SGLang, as 0.5.24")
    parser.add_argument("--write", action="store_true", help="the installed one's contract, anew")
    options = parser.parse_args()
    if options.write:
        write_contract()
    elif not options.releases:
        parser.error("name a release, or --write")
    found = False
    for release in options.releases:
        base = base_of(release)
        with tempfile.TemporaryDirectory() as folder:
            changes = moved(contract_of(base), download(release, Path(folder)))
        print(
            f"SGLang {release}: {len(changes)} of {len(contract_of(base))} names are not what they "
            f"were in {base}"
        )
        for name, (was, now) in changes.items():
            print(f"  {name}\n    was: {was}\n    now: {now or 'not there'}")
        found = found or bool(changes)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
