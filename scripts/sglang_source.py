"""What SGLang's source text says of a name, without importing it; works on any unpacked wheel."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Definition = tuple[str, ast.AST]
"""The dotted name of a module, and what stands in it."""


class SGLangSource:
    """The source below `root`, the folder that holds ``sglang/``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tree = functools.cache(self._parse)
        self._imports = functools.cache(self._read_imports)
        self._definitions = functools.cache(lambda node: dict(reversed([*_definitions(node)])))

    @classmethod
    def installed(cls) -> SGLangSource:
        return cls(Path(str(importlib.metadata.distribution("sglang").locate_file(""))))

    def describe(self, name: str) -> str | None:
        """What `name` is: "module", "class", "attribute", or a function with its parameters, as in
        "async def self, obj". None where there is no such name."""
        found = self.find(name)
        if found is None:
            return None
        node = found[1]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
            return f"{kind} {', '.join(_parameters(node.args))}".rstrip()
        kinds = {ast.Module: "module", ast.ClassDef: "class"}
        return kinds.get(type(node), "attribute")

    def find(self, name: str) -> Definition | None:
        """The definition of a module, or of a name below one, through imports and base classes."""
        module, rest = name, []
        while (tree := self._tree(module)) is None:
            module, _, last = module.rpartition(".")
            if not module:
                return None
            rest.insert(0, last)
        found: Definition | None = (module, tree)
        for part in rest:
            if found is None:
                return None
            found = self._member(found, part)
        return found

    def _member(self, owner: Definition, name: str) -> Definition | None:
        module, node = owner
        if isinstance(node, ast.ClassDef):
            if name in self._definitions(node):
                return module, self._definitions(node)[name]
            bases = (self._named(module, ast.unparse(base)) for base in node.bases)
            found = (self._member(base, name) for base in bases if base is not None)
            return next((member for member in found if member is not None), None)
        if isinstance(node, ast.Module):
            return self._named(module, name)
        return None

    def _named(self, module: str, name: str) -> Definition | None:
        """A name as a module knows it: its own, or imported."""
        tree = self._tree(module)
        if tree is None:
            return None
        first, _, rest = name.partition(".")
        found: Definition | None = None
        if first in self._definitions(tree):
            found = module, self._definitions(tree)[first]
        else:
            imports = self._imports(module)
            for place in (imports.get(first), *(f"{whole}.{first}" for whole in imports["*"])):
                found = found or (self.find(place) if place else None)
        if found is None and (submodule := self._tree(f"{module}.{first}")) is not None:
            found = f"{module}.{first}", submodule
        return self._member(found, rest) if rest and found is not None else found

    def _read_imports(self, module: str) -> dict[str, Any]:
        """Where a module's names are from; under "*" the modules that it takes all names of."""
        names: dict[str, Any] = {"*": []}
        for node in ast.walk(self._tree(module) or ast.Module([], [])):
            if isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    if alias.name == "*":
                        names["*"].append(node.module)
                    else:
                        names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        return names

    def _parse(self, module: str) -> ast.Module | None:
        path = self._root.joinpath(*module.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return ast.Module([], []) if path.is_dir() else None


def _definitions(owner: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What a class or a module defines; of a class also what its methods assign to ``self``."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    waiting = list(ast.iter_child_nodes(owner))
    for node in waiting:
        if isinstance(node, (*functions, ast.ClassDef)):
            yield node.name, node
            if isinstance(owner, ast.ClassDef) and isinstance(node, functions):
                for inner in ast.walk(node):
                    stored = isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
                    if stored and ast.unparse(inner.value) == "self":
                        yield inner.attr, inner
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node
        else:
            waiting.extend(ast.iter_child_nodes(node))


def _parameters(arguments: ast.arguments) -> list[str]:
    groups = [*arguments.posonlyargs, *arguments.args]
    groups += [arguments.vararg] if arguments.vararg else []
    groups += arguments.kwonlyargs
    groups += [arguments.kwarg] if arguments.kwarg else []
    return [argument.arg for argument in groups]
