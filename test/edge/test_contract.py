"""What the package uses of SGLang is as it was written against, by name, for each release.

``contracts/`` has a file for each release with a line for every such name. Whoever uses another
name has it added by ``python scripts/check_sglang.py --write``, and reads the difference.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

import sglang_batchllm
from check_sglang import contract_of, moved
from names_used import SEAMS, names_used
from sglang_source import SGLangSource

RELEASE = version("sglang")
CONTRACT = contract_of(RELEASE)
SOURCE = SGLangSource.installed()


@pytest.mark.parametrize("name", CONTRACT)
def test_a_name_is_what_it_was(name: str) -> None:
    assert SOURCE.describe(f"sglang.{name}") == CONTRACT[name]


def test_every_name_that_is_used_is_listed() -> None:
    used = names_used(RELEASE, SOURCE)
    assert len(used) > 200
    assert not sorted(used - set(CONTRACT))
    assert not sorted(set(CONTRACT) - used)


def test_every_release_has_a_seam_and_a_contract() -> None:
    folders = {path.name for path in SEAMS.iterdir() if path.name.startswith("v")}
    assert folders == {f"v{one.replace('.', '_')}" for one in sglang_batchllm.SGLANG_VERSIONS}
    files = [
        {file.name for file in (SEAMS / folder).glob("*.py") if file.name != "paged_allocator.py"}
        for folder in folders
    ]
    assert all(names == files[0] for names in files), "equal modules in each"
    assert all(contract_of(release) for release in sglang_batchllm.SGLANG_VERSIONS)


def test_what_moved_is_told(tmp_path: Path) -> None:
    (tmp_path / "sglang" / "srt").mkdir(parents=True)
    (tmp_path / "sglang" / "srt" / "a.py").write_text("async def f(x): pass\ndef g(): pass\n")
    contract = {"srt.a.f": "def x", "srt.a.g": "def", "srt.a.h": "class"}
    assert moved(contract, SGLangSource(tmp_path)) == {
        "srt.a.f": ("def x", "async def x"),
        "srt.a.h": ("class", None),
    }


def test_what_tells_one_release_from_another(tmp_path: Path) -> None:
    (tmp_path / "sglang").mkdir()
    text = """
from sglang.other import *
class Base:
    kind: int = 0
    def __init__(self, rid_to_state): self.rid_to_state, self.done = rid_to_state, False
class Request(Base):
    async def send(self, obj, *more, key=1, **rest): pass
    def stop(self): other.rid = 1
"""
    (tmp_path / "sglang" / "a.py").write_text(text)
    (tmp_path / "sglang" / "other.py").write_text("def there(x, /, y): pass")
    (tmp_path / "sglang" / "b.py").write_text("from sglang.a import Request as Mine")
    source = SGLangSource(tmp_path)
    for name, expected in {
        "sglang.a": "module",
        "sglang.b.Mine": "class",
        "sglang.b.Mine.send": "async def self, obj, more, key, rest",
        "sglang.b.Mine.stop": "def self",
        "sglang.b.Mine.kind": "attribute",
        "sglang.b.Mine.done": "attribute",
        "sglang.a.Request.rid_to_state": "attribute",
        "sglang.a.Request.rid": None,
        "sglang.a.there": "def x, y",
        "sglang.a.nowhere": None,
        "sglang.nowhere": None,
    }.items():
        assert source.describe(name) == expected, name
