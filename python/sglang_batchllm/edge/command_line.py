"""What can be said of a server's command line before SGLang is imported, which takes long.

Only where ``--batchllm`` is on it, and only what is certain: anything else SGLang decides itself.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sglang_batchllm

_SOURCES = ("sglang/srt/server_args.py", "sglang/cli/serve.py")
_SOURCE_FOLDER = "sglang/srt/arg_groups"
_NAMES = re.compile(r"^    ([a-z]\w*): |[\"'](--[a-z][\w-]*)[\"']", re.MULTILINE)
"""Annotated fields, each of which is a flag, and flags that are written out."""

_MODEL_FILES = ("config.json", "params.json", "model_index.json")
_TRUE = ("1", "on", "true", "yes")


def version_refusal() -> str | None:
    """The sentence for an SGLang release that is none of ours, None where it is one."""
    installed, ours = importlib.metadata.version("sglang"), sglang_batchllm.SGLANG_VERSIONS
    if installed in ours:
        return None
    return (
        f"--batchllm needs SGLang {' or '.join(ours)}, but SGLang {installed} is installed; "
        f"run: pip install 'sglang=={ours[-1]}'"
    )


def complaint(command: Sequence[str]) -> str | None:
    """What is wrong with the words of a whole command (``sys.orig_argv``): one sentence, or None.

    Looks at ``python -m sglang.launch_server`` and ``sglang serve`` with ``--batchllm`` only.
    """
    words = _server_arguments(command)
    if "--batchllm" not in words or "-h" in words or "--help" in words:
        return None
    return _unknown_flag(words) or _missing_model(words)


def _server_arguments(command: Sequence[str]) -> Sequence[str]:
    for place, word in enumerate(command):
        if word == "sglang.launch_server" and command[place - 1] == "-m":
            return command[place + 1 :]
        if Path(word).name == "sglang" and list(command[place + 1 : place + 2]) == ["serve"]:
            return command[place + 2 :]
    return ()


def _unknown_flag(words: Sequence[str]) -> str | None:
    known = known_flags()
    for word in words if known else ():
        flag = word.partition("=")[0].replace("--no-", "--", 1)
        if not flag.startswith("--") or any(name.startswith(flag) for name in known):
            continue  # argparse takes the beginning of a flag for the flag
        near = difflib.get_close_matches(flag, known, 1)
        hint = f"did you mean {near[0]}?" if near else "see python -m sglang.launch_server --help."
        return f"there is no flag {flag}; {hint}"
    return None


def known_flags() -> set[str]:
    """Every flag that a server takes, and a few words more; empty where that is not certain."""
    sglang = importlib.metadata.distribution("sglang")
    required = [*(sglang.requires or ())]
    files = [Path(str(sglang.locate_file(name))) for name in _SOURCES]
    files.extend(Path(str(sglang.locate_file(_SOURCE_FOLDER))).rglob("*.py"))
    for plugin in importlib.metadata.entry_points(group="sglang.srt.plugins"):
        if plugin.dist is None or plugin.dist.name == "sglang-batchllm":
            continue
        if not any(name.startswith(plugin.dist.name) for name in required):
            return set()  # it may add flags
        added = (file for file in plugin.dist.files or () if file.suffix == ".py")
        files.extend(Path(str(plugin.dist.locate_file(file))) for file in added)
    if not all(file.is_file() for file in files):
        return set()
    files.append(Path(__file__).with_name("args.py"))
    return {
        flag or "--" + field.replace("_", "-")
        for file in files
        for field, flag in _NAMES.findall(file.read_text(encoding="utf-8"))
    }


def _missing_model(words: Sequence[str]) -> str | None:
    model = _value(words, ("--model-path", "--model"))
    if model is None and words and not words[0].startswith("-"):
        model = words[0]  # of `sglang serve`
    if model is None or "://" in model:
        return None
    path = Path(model).expanduser()
    if path.is_file():
        return None
    if path.is_dir():
        if any((path / name).is_file() for name in _MODEL_FILES):
            return None
        return f"--model-path {model} has no config.json; name the folder that holds the model."
    if model.startswith(("/", "./", "../", "~")):
        return f"--model-path {model} does not exist; name a model's folder or its Hugging Face id."
    if _offline() and _value(words, ("--revision",)) is None and not _is_cached(model):
        return (
            f"--model-path {model} is neither a folder nor in the Hugging Face cache, and "
            "HF_HUB_OFFLINE is set; download the model or unset it."
        )
    return None


def _value(words: Sequence[str], flags: Iterable[str]) -> str | None:
    """The last value given to one of the flags, as argparse takes it."""
    found = None
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in flags:
            found = value if equals else next(iter(words[place + 1 : place + 2]), None)
    return found


def _offline() -> bool:
    hub_only = os.environ.get("SGLANG_USE_MODELSCOPE", "").lower() not in _TRUE
    return hub_only and os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(model, name), str) for name in _MODEL_FILES)
    except HFValidationError:
        return False
