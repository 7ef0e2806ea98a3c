"""The rules of the house: who may import whom, and who may touch SGLang."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sglang_batchllm

PACKAGE = "sglang_batchllm"
ROOT = Path(sglang_batchllm.__file__).parent
FOLDERS = ("planning", "policy", "attention", "wire", "jobs", "client", "server", "edge")
FOLDERS += ("ray_data",)
"""In order: a folder imports from itself and from those before it."""

OUTSIDE = {
    "planning": {"numpy"},
    "policy": {"numpy"},
    "attention": {"numpy", "torch", "triton"},
}
"""What may be imported beside Python's own, where that is few."""

REGISTRY = ("hook_registry", "HookRegistry", "register_attention_backend")
REGISTRY += ("register_radix_cache_backend", "hook_custom_types")
"""How something is registered with or replaced in SGLang."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a module's text imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports here are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def folder(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == PACKAGE else None


def own_imports(name: str) -> set[str]:
    found = {found for found in imports(TREES[name]) if found.split(".")[0] == PACKAGE}
    assert found <= set(MODULES), f"{name} imports what is not there: {found - set(MODULES)}"
    return found - {name}


def test_every_folder_has_its_place() -> None:
    assert {folder(name) for name in MODULES} == {None, *FOLDERS}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_upwards(name: str) -> None:
    if name == PACKAGE:
        return  # the public API is from everywhere, and nothing below imports it but its constants
    above = FOLDERS[: FOLDERS.index(folder(name) or "") + 1]
    wrong = {found for found in own_imports(name) if folder(found) not in (None, *above)}
    assert not wrong


@pytest.mark.parametrize("name", MODULES)
def test_imports_from_outside(name: str) -> None:
    place = folder(name)
    found = {found for found in imports(TREES[name]) if found.split(".")[0] != PACKAGE}
    srt = {found for found in found if found.startswith("sglang.srt")}
    sglang = {found for found in found if found.split(".")[0] == "sglang"}
    if place != "edge":
        assert "sglang.srt" not in MODULES[name].read_text(encoding="utf-8")
        assert not srt
    if place == "client":
        assert all(found == "sglang" or found.startswith("sglang.lang") for found in sglang)
    elif place != "edge":
        assert not sglang
    if place in OUTSIDE:
        import sys

        top = {found.split(".")[0] for found in found}
        assert top <= OUTSIDE[place] | set(sys.stdlib_module_names)


def test_no_module_imports_itself_in_a_circle() -> None:
    left = {name: own_imports(name) for name in MODULES}
    shrinks = True
    while shrinks:  # whoever imports none of the others, or is imported by none, is in no circle
        imported = set().union(*left.values())
        kept = {
            name: found & set(left)
            for name, found in left.items()
            if found & set(left) and name in imported
        }
        shrinks, left = kept != left, kept
    assert not left, f"circles among {left}"


@pytest.mark.parametrize("name", MODULES)
def test_only_the_plugin_registers(name: str) -> None:
    if name == f"{PACKAGE}.edge.plugin":
        return
    names = {
        getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", "")
        for node in ast.walk(TREES[name])
        if isinstance(node, (ast.Name, ast.Attribute, ast.alias))
    }
    used = {used for used in names if used.rsplit(".", 1)[-1] in REGISTRY}
    assert not used


def test_importing_torch_or_planning_is_not_importing_the_house() -> None:
    """`plugin` is loaded with torch, before SGLang: so are only modules that need nothing."""
    plugin = f"{PACKAGE}.edge.plugin"
    seen, waiting = set(), [plugin, f"{PACKAGE}.edge", PACKAGE]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        at_once = ast.Module([node for node in TREES[name].body if not _is_typing(node)], [])
        for found in imports(_without_functions(at_once)):
            assert found.split(".")[0] not in ("sglang", "torch", "triton", "numpy"), name
            if found in MODULES:
                waiting.append(found)


def _is_typing(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _without_functions(tree: ast.Module) -> ast.Module:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return ast.Module([node for node in tree.body if not isinstance(node, functions)], [])
