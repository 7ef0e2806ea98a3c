"""What this package registers with or replaces in SGLang. Nothing else does.

`register` runs in every SGLang process before arguments are parsed, and adds nothing but a flag
and what the flag needs to be heard. `extend_frontend` runs once the flag is on. The classes that
stand in here step back to SGLang's own while the flag is off.
"""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import importlib.util
import multiprocessing
import sys
from types import ModuleType

import sglang_batchllm


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_batchllm import args

    if importlib.metadata.version("sglang") != sglang_batchllm.SGLANG_VERSION:
        if any(word.startswith("--batchllm") for word in sys.argv[1:]):
            sys.exit(f"error: {args.version_refusal()}")
        server_args_class = args.RefusingServerArgs
    else:
        server_args_class = args.BatchLLMServerArgs
        _register_runtime()

    HookRegistry.register("sglang.srt.server_args.ServerArgs", server_args_class, HookType.REPLACE)
    if "sglang.srt.entrypoints.engine" in sys.modules:  # it holds the class in an attribute
        HookRegistry.register(
            "sglang.srt.entrypoints.engine.Engine.server_args_class",
            server_args_class,
            HookType.REPLACE,
        )


def _register_runtime() -> None:
    """The scheduler, which is SGLang's own unless ``batchllm`` is set, and our cache by name."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_batchllm.args import CACHE_BACKEND
    from sglang_batchllm.runtime.cache import create_cache
    from sglang_batchllm.runtime.scheduler import BatchLLMScheduler

    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler", BatchLLMScheduler, HookType.REPLACE
    )
    register_radix_cache_backend(CACHE_BACKEND, create_cache)


_frontend_extended = False


def extend_frontend() -> None:
    """In a process that takes requests: lists travel as one batch, and the report has a URL."""
    global _frontend_extended
    if _frontend_extended:
        return
    _frontend_extended = True
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_batchllm.frontend.intake import send_as_one_batch
    from sglang_batchllm.frontend.report import add_report_route

    HookRegistry.register(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._should_use_batch_tokenization",
        send_as_one_batch,
        HookType.AROUND,
    )
    HookRegistry.register(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        add_report_route,
        HookType.BEFORE,
    )
    HookRegistry.apply_hooks()


def load_with(module_name: str) -> None:
    """Load SGLang's plugins as soon as `module_name`, the HTTP server, has been imported.

    ``sgl.Runtime`` builds its arguments without loading plugins first, so it would not know our
    flag; it imports the HTTP server just before, which is where this comes in. Its server process
    then receives the finished arguments, so the frontend is extended there at the same point.
    """
    sys.meta_path.insert(0, _LoadPluginsAfter(module_name))


class _LoadPluginsAfter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, module_name: str):
        self.module_name = module_name

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.module_name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        self.loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        from sglang.srt.plugins import load_plugins

        load_plugins()
        if multiprocessing.parent_process() is not None:
            extend_frontend()
