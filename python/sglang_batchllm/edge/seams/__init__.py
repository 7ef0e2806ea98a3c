"""What differs between SGLang releases: a folder for each generation, with equal modules in each.

Nothing else asks which release is installed. A module of the edge takes what it needs by ``load``,
so that the generation that is not installed is never imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType


def load(module: str) -> ModuleType:
    """The module of that name in the folder of the installed release."""
    release = importlib.metadata.version("sglang").replace(".", "_")
    return importlib.import_module(f"{__name__}.v{release}.{module}")
