"""The ``--batchllm`` flags, and what they refuse."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.arg_groups.arg_utils import A, Arg
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import get_bool_env_var

from sglang_batchllm.edge import seams
from sglang_batchllm.edge.model_kind import (
    has_compressed_attention,
    has_only_windows,
    has_recurrent_state,
    is_mla,
    prefill_is_compiled,
)
from sglang_batchllm.edge.names import ATTENTION_BACKEND, CACHE_BACKEND
from sglang_batchllm.edge.platform import cpu
from sglang_batchllm.server.batches import directory

if TYPE_CHECKING:
    from sglang_batchllm.edge.seams.v0_5_17 import args as seam
else:
    seam = seams.load("args")

logger = logging.getLogger(__name__)

LARGE_GPU_MIB = 60 * 1024
LARGE_GPU_GRAPH_BATCH = 1024
"""Decode steps of up to so many requests run as CUDA graphs on a large GPU. SGLang stops at 256,
but with shared prefixes a pool holds more, and launching 256 to 1,024 requests kernel by kernel
leaves the GPU waiting (H200, Llama-8B shapes: about 3 ms of a step in cases M1 and M6)."""


class UnsupportedError(ValueError):
    """A flag, model or version that ``--batchllm`` does not work with; says what to change."""


@seam.record
class BatchLLMServerArgs(seam.ResolvingServerArgs):
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
            "--decode-attention-backend says otherwise, and native with latent attention (MLA).",
            choices=["auto", "fused", "native"],
        ),
    ] = "auto"

    batchllm_files: A[
        str | None,
        Arg(
            help="With --batchllm, the directory in which the server keeps the files and batches "
            "of /v1/files and /v1/batches, on a local disk. Without it they are gone when the "
            "server ends."
        ),
    ] = None

    _overlaps = False  # steps of a model with recurrent state

    @staticmethod
    def prepare_process() -> None:
        """What else this process needs for ``batchllm``; `plugin.py` says what, and sets it."""

    def before_resolution(self) -> None:
        if self.batchllm:
            self._refuse_unsupported_flags()
            self._name_what_has_no_effect()
            self.radix_cache_backend = CACHE_BACKEND

    def after_resolution(self) -> None:
        if cpu.is_active() and seam.resolved(self).attention_backend != cpu.ATTENTION:
            seam.set_attention_backend(self, cpu.ATTENTION)  # some models ask for kernels of a GPU
        if self.batchllm and self.model_path.lower() not in ("none", "dummy"):
            self._refuse_unsupported_model()
            if self._overlaps:
                seam.overlap(self)
            if self._wants_fused_attention():
                # Only now, so that SGLang has chosen everything else as it would without us.
                seam.set_decode_backend(self, ATTENTION_BACKEND)
            self.prepare_process()

    def before_recurrent_cache(self) -> None:
        """A state is kept where a plan's prompts branch, after the pass that ends there: SGLang's
        strategy without buffers for its own guesses. SGLang takes that with no overlap alone; what
        is kept here is copied in the pass's own stream, so steps overlap all the same."""
        if not self.batchllm or not has_recurrent_state(seam.model_config(self)):
            return
        strategy = self.mamba_radix_cache_strategy
        for flag, is_set, reason in (
            (
                f"--mamba-radix-cache-strategy {strategy}",
                strategy not in ("auto", "no_buffer"),
                "states are kept by plan",
            ),
            (
                f"--page-size {self.page_size}",
                self.page_size not in (None, 1),
                "prompts may branch anywhere",
            ),
            (
                "--chunked-prefill-size -1",
                (self.chunked_prefill_size or 0) < 0,
                "prefill ends where prompts branch",
            ),
            (
                "--enable-mixed-chunk",
                self.enable_mixed_chunk,
                "its steps have not been shown to be exact there",
            ),
        ):
            if is_set:
                raise UnsupportedError(
                    f"--batchllm does not support {flag} for a model with Mamba or "
                    f"linear-attention state; leave it out, since {reason}."
                )
        self._overlaps |= not seam.resolved(self).disable_overlap_schedule
        seam.keep_states_by_plan(self)

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> BatchLLMServerArgs:
        try:
            server_args = super().from_cli_args(args)
            if server_args.batchllm and server_args.batchllm_files is not None:
                directory.check(server_args.batchllm_files)
            return server_args
        except UnsupportedError as error:
            sys.exit(f"error: {error}")
        except directory.DirectoryError as error:
            sys.exit(f"error: --batchllm-files: {error}")

    def before_graph_sizes(self, graphs: Any, device: str | None, device_mib: float | None) -> None:
        large = self.batchllm and device == "cuda" and (device_mib or 0) >= LARGE_GPU_MIB
        if large and graphs.decode.max_bs is None and graphs.decode.bs is None:
            graphs.decode.max_bs = LARGE_GPU_GRAPH_BATCH
        prefill = graphs.prefill
        asked = prefill.max_bs is not None or prefill.bs is not None
        self._halves_prefill_graphs = (
            self.batchllm and not asked and not prefill_is_compiled(graphs)
        )

    def after_graph_sizes(self, graphs: Any) -> None:
        prefill = graphs.prefill
        if self._halves_prefill_graphs and prefill.max_bs and prefill.bs:
            # Full steps run eagerly, with less of the last layer (`last_layer.py`): their launches
            # take a tenth of their GPU time, and a graph would compute it whole.
            limit = prefill.max_bs // 2
            prefill.max_bs, prefill.bs = limit, [size for size in prefill.bs if size <= limit]

    def _wants_fused_attention(self) -> bool:
        if self.batchllm_attention == "auto":
            decided = seam.resolved(self)
            chosen = decided.device != "cuda" or decided.decode_attention_backend is not None
            # Of latents ours gains only where many share, which nobody knows at the start.
            return not chosen and not is_mla(seam.model_config(self))
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

    def _name_what_has_no_effect(self) -> None:
        if self.schedule_conservativeness != seam.default_of("schedule_conservativeness"):
            logger.warning(
                "--schedule-conservativeness %s has no effect with --batchllm, which admits "
                "requests by the memory that they are forecast to need; leave it out.",
                self.schedule_conservativeness,
            )

    def _refuse_unsupported_model(self) -> None:
        model = seam.model_config(self)
        kind = None
        if not model.is_generation:
            kind = "an embedding or reward model"
        elif has_compressed_attention(model):
            kind = "a model with compressed attention"
        elif has_only_windows(model):
            kind = "a model in which every layer has a sliding window"
        elif model.is_encoder_decoder:
            kind = "an encoder-decoder model"
        elif has_recurrent_state(model) and not seam.keeps_states(self):
            kind = "a model with Mamba or linear-attention state (of this kind, on this SGLang)"
        elif has_recurrent_state(model) and model.is_hybrid_swa:
            kind = "a model with both recurrent state and sliding windows"
        if kind is not None:
            raise UnsupportedError(
                f"--batchllm does not support {kind} (--model-path {self.model_path}); "
                "serve it without --batchllm."
            )
        if self.batchllm_attention == "auto" and is_mla(model):
            logger.warning(
                "--batchllm: latent attention decodes natively; where prefixes have 16 requests or "
                "more each, try --batchllm-attention fused."
            )


def resolved(server_args: ServerArgs) -> Any:
    """The arguments by name, with what SGLang has decided."""
    return seam.resolved(server_args)


_UNSUPPORTED_FLAGS: list[tuple[str, Callable[[Any], Any], str]] = [
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
    ("--dwdp-size above 1", lambda a: a.dwdp_size > 1, "use --dp-size instead"),
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
    (
        "SGLANG_RUST_SERVER",
        lambda a: get_bool_env_var("SGLANG_RUST_SERVER"),
        "unset it, since it replaces the process that keeps a list together",
    ),
    ("--enable-priority-scheduling", lambda a: a.enable_priority_scheduling, "leave it out"),
]
