"""What this package registers with or replaces in SGLang. Nothing else does.

`register` runs in every SGLang process before arguments are parsed, and adds nothing but a flag
and what the flag needs to be heard. `extend_frontend` runs once the flag is on. The classes that
stand in here step back to SGLang's own while the flag is off.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
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
    """The scheduler (SGLang's own unless ``batchllm`` is set), the cache and the attention."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_batchllm.args import ATTENTION_BACKEND, CACHE_BACKEND
    from sglang_batchllm.attention import create_batchllm_backend
    from sglang_batchllm.runtime.cache import create_cache
    from sglang_batchllm.runtime.scheduler import BatchLLMScheduler

    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler", BatchLLMScheduler, HookType.REPLACE
    )
    register_radix_cache_backend(CACHE_BACKEND, create_cache)
    register_attention_backend(ATTENTION_BACKEND)(create_batchllm_backend)


@functools.cache
def extend_frontend() -> None:
    """In a process that takes requests, once the flag is on: lists travel as one batch."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_batchllm.frontend.intake import send_as_one_batch

    HookRegistry.register(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._should_use_batch_tokenization",
        send_as_one_batch,
        HookType.AROUND,
    )
    HookRegistry.apply_hooks()


def _extend_http_server() -> None:
    """The report gets a URL, if the server is started with the flag."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_batchllm.frontend.report import add_report_route

    HookRegistry.register(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        add_report_route,
        HookType.BEFORE,
    )
    HookRegistry.apply_hooks()
    if "--multiprocessing-fork" in sys.orig_argv:
        extend_frontend()  # the server process of sgl.Runtime, whose arguments are finished


def load_early() -> None:
    """Load SGLang's plugins in the two places that know our flag only after that, and do not.

    ``sglang serve --help`` prints its flags without loading plugins, and ``sgl.Runtime`` builds
    its arguments without; each imports one module just before, and loading follows that import.
    """
    sys.meta_path.insert(0, _LoadPluginsAfter("sglang.cli.serve"))
    sys.meta_path.insert(
        0, _LoadPluginsAfter("sglang.srt.entrypoints.http_server", _extend_http_server)
    )


class _LoadPluginsAfter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module as usual, and loads SGLang's plugins once it has been imported."""

    def __init__(self, module_name: str, then: Callable[[], None] = lambda: None):
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
        self._loader.exec_module(module)
        from sglang.srt.plugins import load_plugins

        load_plugins()
        self._then()
