"""SGLang's arguments, a dataclass that decides what it was not told as soon as it is made."""

from __future__ import annotations

import dataclasses
from typing import Any

from sglang.srt.server_args import ServerArgs

record = dataclasses.dataclass
"""Decorates a subclass that adds fields."""


class ResolvingServerArgs(ServerArgs):
    """Tells when SGLang decides what it was not told."""

    def before_resolution(self) -> None:
        """The arguments are as they were given."""

    def after_resolution(self) -> None:
        """SGLang has decided everything else."""

    def before_graph_sizes(self, graphs: Any, device: str | None, device_mib: float | None) -> None:
        """SGLang is about to decide which batch sizes get CUDA graphs. graphs: its
        CudaGraphConfig, to be changed in place. device_mib: the device's memory, if known."""

    def after_graph_sizes(self, graphs: Any) -> None:
        """It has; `graphs` as before."""

    def before_recurrent_cache(self) -> None:
        """SGLang is about to decide how to keep states, if the model's layers have them."""

    def _handle_mamba_radix_cache(self, model_arch: str) -> None:
        self.before_recurrent_cache()
        super()._handle_mamba_radix_cache(model_arch)

    def __post_init__(self) -> None:
        self.before_resolution()
        super().__post_init__()
        self.after_resolution()

    def _handle_gpu_memory_settings(self, gpu_mem: float | None) -> None:
        self.before_graph_sizes(self.cuda_graph_config, self.device, gpu_mem)
        super()._handle_gpu_memory_settings(gpu_mem)
        self.after_graph_sizes(self.cuda_graph_config)


def register() -> None:
    """What SGLang is to be told of these; `plugin.py` calls it."""


def resolved(server_args: ServerArgs) -> Any:
    """The arguments by name, as SGLang has decided."""
    return server_args


def default_of(name: str) -> Any:
    """An argument's default."""
    return getattr(ServerArgs, name)


def model_config(server_args: ServerArgs) -> Any:
    """The ModelConfig of the arguments' model."""
    return server_args.get_model_config()


def keeps_states(server_args: ServerArgs) -> bool:
    """Of a model whose layers keep a state, whether the cache here can hold it."""
    return server_args.uses_mamba_radix_cache


def keep_states_by_plan(server_args: ServerArgs) -> None:
    """Choose SGLang's strategy without buffers for the states of layers that keep one. SGLang takes
    it with no overlap only, see `overlap`."""
    server_args.disable_overlap_schedule = True


def overlap(server_args: ServerArgs) -> None:
    """Have steps overlap with their scheduling after SGLang has chosen everything."""
    server_args.override("batchllm", disable_overlap_schedule=False)


def set_decode_backend(server_args: ServerArgs, name: str) -> None:
    """Choose the decode attention backend after SGLang has chosen everything."""
    server_args.override("batchllm", decode_attention_backend=name)


def set_attention_backend(server_args: ServerArgs, name: str) -> None:
    """The same of the one for all attention."""
    server_args.override("batchllm", attention_backend=name)
