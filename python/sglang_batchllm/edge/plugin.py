"""What this package registers with or replaces in SGLang. Nothing else does.

`register` runs before SGLang is imported, and has a few of its modules followed by what
`_FOLLOWED` says: a flag, and what the flag needs to be heard. `extend_frontend` and
`extend_runtime` run once it is on. What stands in here for SGLang's own steps back to that while
the flag is off.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

from sglang_batchllm.edge import command_line
from sglang_batchllm.edge.follow import when_imported


@functools.cache
def register() -> None:
    """Entry point of three groups, for whichever comes first in a process.

    ``torch.backends`` is loaded at the end of ``import torch``, before anything of SGLang's that
    is followed here. So scripts that parse SGLang's arguments themselves know the flag, clients,
    which load no plugins, hand their batches over, and both also where SGLANG_PLATFORM has SGLang
    skip all of a package that holds another platform. ``sglang.srt.platforms`` and
    ``sglang.srt.plugins`` are for processes that keep torch from loading backends.
    """
    if importlib.util.find_spec("sglang") is None:
        return  # `planning` is used without it
    chosen = os.environ.get("SGLANG_PLUGINS")
    if chosen and "batchllm" not in map(str.strip, chosen.split(",")):
        return
    refusal = command_line.version_refusal()
    if refusal is not None:
        if any(word.startswith("--batchllm") for word in sys.argv[1:]):
            sys.exit(f"error: {refusal}")
        when_imported("sglang_batchllm.edge.refusing", _add_refusing_flag)
        when_imported("sglang.srt.server_args", lambda: _import("refusing"))
        return
    complaint = command_line.complaint(sys.orig_argv)
    if complaint is not None:
        sys.exit(f"error: {complaint}")
    for module_name, extend in _FOLLOWED.items():
        when_imported(module_name, extend)


def _add_flags() -> None:
    from sglang_batchllm.edge import seams
    from sglang_batchllm.edge.args import BatchLLMServerArgs

    seams.load("args").register()
    BatchLLMServerArgs.prepare_process = staticmethod(extend_frontend)
    _hook("replace", "srt.server_args.ServerArgs", BatchLLMServerArgs)
    _apply_hooks()


def _add_refusing_flag() -> None:
    from sglang_batchllm.edge.refusing import RefusingServerArgs

    _hook("replace", "srt.server_args.ServerArgs", RefusingServerArgs)
    _apply_hooks()


def _add_cache() -> None:
    from sglang.srt.mem_cache.registry import register_radix_cache_backend

    from sglang_batchllm.edge.names import CACHE_BACKEND

    def create_cache(context: Any) -> Any:
        from sglang_batchllm.edge import seams

        return seams.load("cache").create_cache(context)

    register_radix_cache_backend(CACHE_BACKEND, create_cache)


def _add_attention() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from sglang_batchllm.edge.names import ATTENTION_BACKEND

    def create_backend(model_runner: Any) -> Any:
        from sglang_batchllm.edge import attention_backend

        return attention_backend.create_batchllm_backend(model_runner)

    register_attention_backend(ATTENTION_BACKEND)(create_backend)


def _add_cpu_attention() -> None:
    from sglang_batchllm.edge.platform import cpu
    from sglang_batchllm.edge.platform.attention import CpuAttention

    if cpu.is_active():
        _hook(
            "replace",
            "srt.layers.attention.torch_native_backend.TorchNativeAttnBackend",
            CpuAttention,
        )
        _apply_hooks()


def _add_cpu_gated_delta() -> None:
    from sglang_batchllm.edge.platform import cpu

    if cpu.is_active():
        from sglang_batchllm.edge.platform.gated_delta import CpuGatedDeltaNet

        _hook(
            "replace",
            "srt.layers.attention.linear.gdn_backend.GDNAttnBackend",
            CpuGatedDeltaNet,
        )
        _hook_cpu_norms()
        _apply_hooks()


def _add_cpu_kimi_delta() -> None:
    from sglang_batchllm.edge.platform import cpu

    if cpu.is_active():
        from sglang_batchllm.edge.platform.kimi_delta import CpuKimiDelta

        _hook("replace", "srt.layers.attention.linear.kda_backend.KDAAttnBackend", CpuKimiDelta)
        _hook_cpu_norms()
        _apply_hooks()


@functools.cache
def _hook_cpu_norms() -> None:
    from sglang_batchllm.edge.platform.gates import gated_norm

    for norm in (
        "kernels.ops.attention.fla.fused_norm_gate.FusedRMSNormGated.forward",
        "kernels.ops.attention.fla.layernorm_gated.RMSNorm.forward",
    ):
        _hook("around", norm, gated_norm)


def _add_cpu_mamba() -> None:
    from sglang_batchllm.edge.platform import cpu

    if cpu.is_active():
        from sglang_batchllm.edge.platform.mamba import CpuMamba

        _hook(
            "replace",
            "srt.layers.attention.hybrid_linear_attn_backend.Mamba2AttnBackend",
            CpuMamba,
        )
        _apply_hooks()


def _add_cpu_gates() -> None:
    from sglang_batchllm.edge.platform import cpu
    from sglang_batchllm.edge.platform.gates import add_gated, multiply_gated

    if cpu.is_active():
        _hook("around", "kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add", add_gated)
        _hook("around", "kernels.ops.elementwise.elementwise.fused_sigmoid_mul", multiply_gated)
        _apply_hooks()


def _add_cpu_experts() -> None:
    from sglang_batchllm.edge.platform import cpu
    from sglang_batchllm.edge.platform.experts import leave_out_others

    if cpu.is_active():
        _hook("around", "srt.layers.moe.fused_moe_native.moe_forward_native", leave_out_others)
        _apply_hooks()


def _size_pools() -> None:
    from sglang_batchllm.edge import seams
    from sglang_batchllm.edge.platform import cpu
    from sglang_batchllm.edge.states import slots_per_request

    _hook(
        "around",
        "srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._calculate_mamba_ratio",
        slots_per_request,
    )
    if cpu.is_active():
        for target, wrapper in seams.load("platform").HOOKS.items():
            _hook("around", target, wrapper)
    _apply_hooks()


def _add_scheduler() -> None:
    """SGLang's own is what it makes unless ``batchllm`` is set."""
    from sglang_batchllm.edge.scheduler import BatchLLMScheduler

    BatchLLMScheduler.prepare_process = staticmethod(extend_runtime)
    _hook("replace", "srt.managers.scheduler.Scheduler", BatchLLMScheduler)
    _apply_hooks()


def _add_routing() -> None:
    """Between front end and replicas; SGLang's own while the flag is off."""
    from sglang_batchllm.edge.routing import know_lists, pass_on_list

    for name, wrapper in {
        "srt.managers.data_parallel_controller.DataParallelController.init_dispatcher": (
            functools.partial(know_lists, _know_messages)
        ),
        "srt.managers.data_parallel_controller.DataParallelController.dispatch_batch_generate": (
            pass_on_list
        ),
    }.items():
        _hook("around", name, wrapper)
    _apply_hooks()


def _know_messages() -> None:
    """Ours are among those that the process understands."""
    from sglang.srt.managers.io_struct import hook_custom_types

    from sglang_batchllm.edge.messages import AbortList, NameTurns, ReleaseTexts

    hook_custom_types(NameTurns, ReleaseTexts, AbortList)


@functools.cache
def extend_runtime() -> None:
    """In a scheduler process, once the flag is on: admission by memory, shared mixed batches,
    packed queries, shared logprobs, states copied in parts, and our messages among those that it
    understands."""
    from sglang_batchllm.edge import seams
    from sglang_batchllm.edge.adder import ForecastPrefillAdder
    from sglang_batchllm.edge.chunking import stream_output
    from sglang_batchllm.edge.mixed import run_eagerly, select_backend
    from sglang_batchllm.edge.queries import forward_with_packed_queries
    from sglang_batchllm.edge.scoring import limit_prefix, score_rows
    from sglang_batchllm.edge.states import copy_in_parts

    _know_messages()
    adder = seams.load("adder").REPLACED
    if adder is not None:
        _hook("replace", adder, ForecastPrefillAdder)
    _hook("around", "srt.model_executor.runner.eager_runner.EagerRunner.execute", run_eagerly)
    _hook(
        "around",
        "srt.layers.attention.hybrid_attn_backend.HybridAttnBackend._select_backend",
        select_backend,
    )
    _hook(
        "around",
        "srt.layers.attention.hybrid_attn_backend.HybridAttnBackend.forward",
        forward_with_packed_queries,
    )
    _hook(
        "around",
        "srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output",
        stream_output,
    )
    _hook("around", "srt.mem_cache.memory_pool.MambaPool.copy_from", copy_in_parts)
    _hook("around", "srt.managers.schedule_batch.Req._compute_max_prefix_len", limit_prefix)
    _hook("around", "srt.layers.logprob_processor.InputLogprobProcessor.forward", score_rows)
    _apply_hooks()


@functools.cache
def extend_frontend() -> None:
    """In a process that takes requests, once the flag is on: lists travel as one batch, and
    programs may hand theirs over."""
    from sglang_batchllm.edge.front import BatchLLMTokenizerManager

    _hook("replace", "srt.managers.tokenizer_manager.TokenizerManager", BatchLLMTokenizerManager)
    _apply_hooks()
    _extend_engine()


def _extend_engine() -> None:
    """Programs take an engine as they take a server: `endpoint` is where SGLang looks."""
    from sglang.srt.entrypoints.engine import Engine

    from sglang_batchllm.edge.engine_backend import EngineBackend

    endpoint = functools.cached_property(EngineBackend)
    endpoint.__set_name__(Engine, "endpoint")
    Engine.endpoint = endpoint  # type: ignore[attr-defined]


def _extend_http_server() -> None:
    """The report, `run_batch` and the batch API get URLs, if the server has the flag."""

    def add_routes(server_args: Any, *_: Any, **__: Any) -> None:
        if getattr(server_args, "batchllm", False):
            from sglang_batchllm.edge.batch_api import add_batch_api_routes
            from sglang_batchllm.edge.front import add_batchllm_routes
            from sglang_batchllm.server.refused_heads import answer_refused_heads

            answer_refused_heads()
            add_batchllm_routes()
            add_batch_api_routes(server_args)

    _hook("before", "srt.entrypoints.http_server._setup_and_run_http_server", add_routes)
    _apply_hooks()
    if "--multiprocessing-fork" in sys.orig_argv:
        extend_frontend()  # the server process of sgl.Runtime, whose arguments are finished


def _extend_language() -> None:
    """In every process that imports SGLang, with or without an engine: `run_batch` asks its
    backend for the flag, and hands its batch over where it is set. The wrappers are imported when
    they are called, as it may be one of their modules that imports SGLang here."""
    for name, (module, wrapper) in {
        "lang.interpreter.run_program_batch": ("run_batch", "run_batch"),
        "lang.interpreter.run_program": ("tracing", "stop_tracing"),
        "lang.backend.runtime_endpoint.http_request": ("exchange", "exchange"),
        "lang.backend.runtime_endpoint.RuntimeEndpoint.commit_lazy_operations": (
            "exchange",
            "cache_prefix",
        ),
    }.items():
        _hook("around", name, functools.partial(_call_client, module, wrapper))
    _apply_hooks()


def _call_client(module: str, wrapper: str, *args: Any, **kwargs: Any) -> Any:
    found = importlib.import_module(f"sglang_batchllm.client.{module}")
    return getattr(found, wrapper)(*args, **kwargs)


_FOLLOWED: dict[str, Callable[[], None]] = {
    "sglang.srt.server_args": lambda: _import("args"),
    "sglang_batchllm.edge.args": _add_flags,
    "sglang.srt.mem_cache.registry": _add_cache,
    "sglang.srt.layers.attention.attention_registry": _add_attention,
    "sglang.srt.layers.attention.torch_native_backend": _add_cpu_attention,
    "sglang.srt.layers.attention.linear.gdn_backend": _add_cpu_gated_delta,
    "sglang.srt.layers.attention.linear.kda_backend": _add_cpu_kimi_delta,
    "sglang.srt.layers.attention.hybrid_linear_attn_backend": _add_cpu_mamba,
    "sglang.kernels.ops.elementwise.elementwise": _add_cpu_gates,
    "sglang.srt.layers.moe.fused_moe_native": _add_cpu_experts,
    "sglang.srt.mem_cache.kv_cache_configurator": _size_pools,
    "sglang.srt.managers.scheduler": lambda: _import("scheduler"),
    "sglang_batchllm.edge.scheduler": _add_scheduler,
    "sglang.srt.managers.data_parallel_controller": lambda: _import("routing"),
    "sglang_batchllm.edge.routing": _add_routing,
    "sglang.srt.entrypoints.http_server": _extend_http_server,
    "sglang.lang.backend.runtime_endpoint": _extend_language,
}
"""What runs once a module has been imported. As that may be in the middle of others, what imports
much of SGLang waits until it is called. Modules of ours are followed where they may come first, and
import what they are to follow: arguments that were pickled name our class."""


def _import(name: str) -> None:
    importlib.import_module(f"sglang_batchllm.edge.{name}")


def _hook(how: Literal["replace", "around", "before"], target: str, hook: Callable) -> None:
    """Have SGLang's registry replace or wrap `target`, a name below ``sglang``, written out so that
    the contract test reads it."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    source = HookSource("batchllm", "sglang-batchllm")  # for SGLang's log
    HookRegistry.register(f"sglang.{target}", hook, HookType(how), source=source)


def _apply_hooks() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()
