"""Code that runs once a module of SGLang's has been imported, whoever imports it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(module_name: str, then: Callable[[], None]) -> None:
    """Call `then` when the module has been imported: now, or right after its own code has run."""
    if module_name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _After(module_name, then))


class _After(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module as usual, and calls `then` once it has been imported."""

    def __init__(self, module_name: str, then: Callable[[], None]) -> None:
        self._module_name = module_name
        self._then = then

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        if fullname != self._module_name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        self._loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader  # as if it were never here
        self._loader.exec_module(module)
        self._then()
