"""Global prefix sharing and throughput-oriented batching for SGLang.

An overlay on SGLang's own extension points: installing the package adds ``--batchllm`` to every
SGLang entry point, and changes nothing while that flag is off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_batchllm.client.get_report import get_report
    from sglang_batchllm.planning import BatchPlan, plan_batch
else:
    # Imported when they are used: this package is loaded wherever torch is.
    _MODULES = {
        "BatchPlan": "sglang_batchllm.planning",
        "get_report": "sglang_batchllm.client.get_report",
        "plan_batch": "sglang_batchllm.planning",
    }

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        return getattr(importlib.import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})


__all__ = ["SGLANG_VERSIONS", "BatchPlan", "__version__", "get_report", "plan_batch"]

__version__ = "0.1.0"
SGLANG_VERSIONS = ("0.5.17", "0.5.23")
"""The SGLang releases that this version was tested with."""
