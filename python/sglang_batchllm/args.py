"""The ``--batchllm`` flags, and what they refuse."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable
from typing import Any

from sglang.srt.arg_groups.arg_utils import A, Arg
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.server_args import ServerArgs

from sglang_batchllm import SGLANG_VERSION

logger = logging.getLogger(__name__)

CACHE_BACKEND = "batchllm"
"""The name under which the pinned-group cache is registered with SGLang."""

ATTENTION_BACKEND = "batchllm"
"""The name under which the fused decode attention is registered with SGLang."""

LARGE_GPU_MIB = 60 * 1024
LARGE_GPU_GRAPH_BATCH = 1024
"""Decode steps of up to so many requests run as CUDA graphs on a large GPU. SGLang stops at 256,
but with shared prefixes a pool holds more, and launching 256 to 1,024 requests kernel by kernel
leaves the GPU waiting (H200, Llama-8B shapes: about 3 ms of a step in cases M1 and M6)."""


class UnsupportedError(ValueError):
    """A flag, model or version that ``--batchllm`` does not work with; says what to change."""


@dataclasses.dataclass
class BatchLLMServerArgs(ServerArgs):
    """SGLang's server arguments plus ours; with ``batchllm`` off they are SGLang's own.

    Raises UnsupportedError for a combination that the overlay does not support. On a command
    line the process ends with the same sentence instead.
    """

    batchllm: A[
        bool,
        Arg(
            help="Run batches of prompts with global prefix sharing: the prompts of a batch are "
            "planned together, and each shared prefix is computed once and pinned until its "
            "last use."
        ),
    ] = False
    batchllm_gather_ms: A[
        float,
        Arg(
            help="With --batchllm, how long (in milliseconds) a request that arrives alone waits "
            "at most for others to be planned with. A list in one call never waits."
        ),
    ] = 10.0

    batchllm_attention: A[
        str,
        Arg(
            help="With --batchllm, decode attention: 'fused' reads each shared prefix once for all "
            "requests that share it, 'native' is SGLang's own, 'auto' is fused on CUDA unless "
            "--decode-attention-backend says otherwise.",
            choices=["auto", "fused", "native"],
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        if self.batchllm:
            self._refuse_unsupported_flags()
            self.radix_cache_backend = CACHE_BACKEND
        super().__post_init__()
        if self.batchllm and self.model_path.lower() not in ("none", "dummy"):
            self._refuse_unsupported_model()
            if self._wants_fused_attention():
                # Only now, so that SGLang has chosen everything else as it would without us.
                self.override("batchllm", decode_attention_backend=ATTENTION_BACKEND)
            from sglang_batchllm import plugin

            plugin.extend_frontend()

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> BatchLLMServerArgs:
        try:
            return super().from_cli_args(args)
        except UnsupportedError as error:
            sys.exit(f"error: {error}")

    def _handle_gpu_memory_settings(self, gpu_mem: float | None) -> None:
        graphs = self.cuda_graph_config
        assert graphs is not None  # SGLang has resolved it
        large = self.batchllm and self.device == "cuda" and (gpu_mem or 0) >= LARGE_GPU_MIB
        if large and graphs.decode.max_bs is None and graphs.decode.bs is None:
            graphs.decode.max_bs = LARGE_GPU_GRAPH_BATCH
        prefill = graphs.prefill
        ours = self.batchllm and prefill.max_bs is None and prefill.bs is None
        super()._handle_gpu_memory_settings(gpu_mem)
        if ours and prefill.max_bs and prefill.bs:
            # Full steps run eagerly, with less of the last layer (`last_layer.py`): their launches
            # take a tenth of their GPU time, and a graph would compute it whole.
            limit = prefill.max_bs // 2
            prefill.max_bs, prefill.bs = limit, [size for size in prefill.bs if size <= limit]

    def _wants_fused_attention(self) -> bool:
        if self.batchllm_attention == "auto":
            is_mla = self.get_model_config().attention_arch == AttentionArch.MLA
            return self.device == "cuda" and self.decode_attention_backend is None and not is_mla
        return self.batchllm_attention == "fused"

    def _refuse_unsupported_flags(self) -> None:
        if self.batchllm_gather_ms < 0:
            raise UnsupportedError(
                f"--batchllm-gather-ms is {self.batchllm_gather_ms}; pass 0 or more milliseconds."
            )
        if self.batchllm_attention == "fused" and self.decode_attention_backend not in (
            None,
            ATTENTION_BACKEND,
        ):
            raise UnsupportedError(
                f"--batchllm-attention fused and --decode-attention-backend "
                f"{self.decode_attention_backend} contradict each other; leave one out."
            )
        for flag, is_set, remedy in _UNSUPPORTED_FLAGS:
            if is_set(self):
                raise UnsupportedError(f"--batchllm does not support {flag}; {remedy}.")

    def _refuse_unsupported_model(self) -> None:
        model = self.get_model_config()
        kind = None
        if not model.is_generation:
            kind = "an embedding or reward model"
        elif model.is_hybrid_swa:
            kind = "a hybrid sliding-window model"
        elif model.is_encoder_decoder:
            kind = "an encoder-decoder model"
        elif _has_recurrent_state(model):
            kind = "a model with Mamba or linear-attention state"
        if kind is not None:
            raise UnsupportedError(
                f"--batchllm does not support {kind} (--model-path {self.model_path}); "
                "serve it without --batchllm."
            )
        if model.attention_arch == AttentionArch.MLA:
            logger.warning("--batchllm: an MLA model gets planning, pinning and order only.")


def _has_recurrent_state(model: Any) -> bool:
    from sglang.srt.configs import hybrid_arch

    finders = (
        hybrid_arch.hybrid_gdn_config,
        hybrid_arch.mamba2_config,
        hybrid_arch.kimi_linear_config,
        hybrid_arch.hybrid_lightning_config,
        hybrid_arch.linear_attn_model_spec,
    )
    return any(find(model) is not None for find in finders)


_UNSUPPORTED_FLAGS: list[tuple[str, Callable[[ServerArgs], Any], str]] = [
    (
        "--speculative-algorithm",
        lambda a: a.speculative_algorithm is not None,
        "leave speculative decoding off",
    ),
    (
        "--disaggregation-mode",
        lambda a: a.disaggregation_mode not in (None, "null"),
        "run prefill and decode in one server",
    ),
    ("--encoder-only", lambda a: a.encoder_only, "run the whole model in one server"),
    ("--language-only", lambda a: a.language_only, "run the whole model in one server"),
    (
        "--enable-hierarchical-cache",
        lambda a: a.enable_hierarchical_cache,
        "pinned prefixes stay on the device, so leave it out",
    ),
    ("--enable-lmcache", lambda a: a.enable_lmcache, "leave it out"),
    ("--enable-flexkv", lambda a: a.enable_flexkv, "leave it out"),
    (
        "--enable-session-radix-cache",
        lambda a: a.enable_session_radix_cache,
        "send each turn's whole prompt instead of a session",
    ),
    (
        "--enable-streaming-session",
        lambda a: a.enable_streaming_session,
        "send each turn's whole prompt instead of a session",
    ),
    ("--enable-unified-memory", lambda a: a.enable_unified_memory, "leave it out"),
    ("--enable-hisparse", lambda a: a.enable_hisparse, "leave it out"),
    ("--enable-pdmux", lambda a: a.enable_pdmux, "leave it out"),
    ("--dllm-algorithm", lambda a: a.dllm_algorithm is not None, "serve it without --batchllm"),
    ("--is-embedding", lambda a: a.is_embedding, "serve it without --batchllm"),
    ("--pp-size above 1", lambda a: a.pp_size > 1, "use --tp-size instead"),
    ("--dp-size above 1", lambda a: a.dp_size > 1, "start one server per replica instead"),
    ("--enable-dp-attention", lambda a: a.enable_dp_attention, "leave it out"),
    ("--attn-cp-size above 1", lambda a: a.attn_cp_size > 1, "use --tp-size instead"),
    ("--dcp-size above 1", lambda a: a.dcp_size > 1, "use --tp-size instead"),
    (
        "--tokenizer-worker-num above 1",
        lambda a: a.tokenizer_worker_num > 1,
        "leave it at 1, so that a list of prompts arrives as one batch",
    ),
    (
        "--disable-radix-cache",
        lambda a: a.disable_radix_cache,
        "leave it out, since pinned prefixes live in that cache",
    ),
    (
        "--radix-cache-backend",
        lambda a: a.radix_cache_backend not in (None, CACHE_BACKEND),
        "leave it out, since --batchllm brings its own",
    ),
    (
        "--schedule-policy other than fcfs",
        lambda a: a.schedule_policy != "fcfs",
        "leave it out, since --batchllm orders requests itself",
    ),
    ("--enable-priority-scheduling", lambda a: a.enable_priority_scheduling, "leave it out"),
]


@dataclasses.dataclass
class RefusingServerArgs(ServerArgs):
    """Stands in under another SGLang release: knows ``batchllm`` only to refuse it."""

    batchllm: bool = False

    def __post_init__(self) -> None:
        if self.batchllm:
            raise UnsupportedError(version_refusal())
        super().__post_init__()


def version_refusal() -> str:
    """The sentence for an SGLang release other than ours."""
    from sglang.version import __version__

    return (
        f"--batchllm needs SGLang {SGLANG_VERSION}, but SGLang {__version__} is installed; "
        f"run: pip install 'sglang=={SGLANG_VERSION}'"
    )
