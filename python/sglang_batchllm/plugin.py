"""What this package registers with or replaces in SGLang. Nothing else does.

`register` runs in every SGLang process before arguments are parsed, and adds nothing but a flag
and what the flag needs to be heard. `extend_frontend` and `extend_runtime` run once it is on. What
stands in here for SGLang's own steps back to that while the flag is off.
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
def extend_runtime() -> None:
    """In a scheduler process, once the flag is on: admission by memory, shared mixed batches,
    packed queries, and a message of ours among those that it understands."""
    from sglang.srt.managers.io_struct import hook_custom_types
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_batchllm.attention.mixed import select_backend
    from sglang_batchllm.attention.queries import forward_with_packed_queries
    from sglang_batchllm.runtime.adder import ForecastPrefillAdder
    from sglang_batchllm.runtime.held import ReleaseTexts

    hook_custom_types(ReleaseTexts)
    HookRegistry.register(
        "sglang.srt.managers.schedule_policy.PrefillAdder", ForecastPrefillAdder, HookType.REPLACE
    )
    for name, wrapper in {
        "_select_backend": select_backend,
        "forward": forward_with_packed_queries,
    }.items():
        HookRegistry.register(
            f"sglang.srt.layers.attention.hybrid_attn_backend.HybridAttnBackend.{name}",
            wrapper,
            HookType.AROUND,
        )
    HookRegistry.apply_hooks()


@functools.cache
def extend_frontend() -> None:
    """In a process that takes requests, once the flag is on: lists travel as one batch."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_batchllm.frontend.handover import gather
    from sglang_batchllm.frontend.intake import send_as_one_batch

    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    HookRegistry.register(f"{manager}._send_one_request", gather, HookType.AROUND)
    HookRegistry.register(
        f"{manager}._should_use_batch_tokenization", send_as_one_batch, HookType.AROUND
    )
    HookRegistry.apply_hooks()
    _extend_engine()


def _extend_engine() -> None:
    """Programs take an engine as they take a server: `endpoint` is where SGLang looks."""
    from sglang.srt.entrypoints.engine import Engine

    from sglang_batchllm.frontend.engine_backend import EngineBackend

    endpoint = functools.cached_property(EngineBackend)
    endpoint.__set_name__(Engine, "endpoint")
    Engine.endpoint = endpoint  # type: ignore[attr-defined]


def _extend_http_server() -> None:
    """The report and `run_batch` get URLs, if the server is started with the flag."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_batchllm.frontend.report import add_report_route
    from sglang_batchllm.frontend.run_route import add_run_route

    _load_plugins()
    for add_route in (add_report_route, add_run_route):
        HookRegistry.register(
            "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
            add_route,
            HookType.BEFORE,
        )
    HookRegistry.apply_hooks()
    if "--multiprocessing-fork" in sys.orig_argv:
        extend_frontend()  # the server process of sgl.Runtime, whose arguments are finished


def _extend_language() -> None:
    """In every process that imports SGLang, with or without an engine: `run_batch` asks its
    backend for the flag, and hands its batch over where it is set."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_batchllm.frontend.exchange import cache_prefix, exchange
    from sglang_batchllm.frontend.run_batch import run_batch
    from sglang_batchllm.frontend.tracing import stop_tracing

    for name, wrapper in {
        "interpreter.run_program_batch": run_batch,
        "interpreter.run_program": stop_tracing,
        "backend.runtime_endpoint.http_request": exchange,
        "backend.runtime_endpoint.RuntimeEndpoint.commit_lazy_operations": cache_prefix,
    }.items():
        HookRegistry.register(f"sglang.lang.{name}", wrapper, HookType.AROUND)
    HookRegistry.apply_hooks()


def load_early() -> None:
    """Have three modules of SGLang's followed by what they do not know of.

    ``sglang serve --help`` prints its flags without loading plugins, and ``sgl.Runtime`` builds
    its arguments without; each imports one module just before. A client of a server loads no
    plugins at all.
    """
    sys.meta_path[:0] = [
        _After("sglang.cli.serve", _load_plugins),
        _After("sglang.srt.entrypoints.http_server", _extend_http_server),
        _After("sglang.lang.backend.runtime_endpoint", _extend_language),
    ]


def _load_plugins() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()


class _After(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module as usual, and calls `then` once it has been imported."""

    def __init__(self, module_name: str, then: Callable[[], None]):
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
        self._then()
