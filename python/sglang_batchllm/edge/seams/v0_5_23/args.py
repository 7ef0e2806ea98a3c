"""SGLang's arguments, a record of what was given; what it decides beyond stands beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sglang.srt.arg_groups.arg_utils import record_fields
from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view
from sglang.srt.arg_groups.overrides import declare_resolution
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.common import get_device_memory_capacity

T = TypeVar("T")


def record(kind: type[T]) -> type[T]:
    """Decorates a subclass that adds fields."""
    return kind


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not getattr(self, "_resolution_finished", False):  # not one that was pickled
            self.before_resolution()

    def resolve_once(self) -> None:
        if getattr(self, "_resolution_finished", False):
            return
        super().resolve_once()
        self.after_resolution()


def register() -> None:
    """What SGLang is to be told of these; `plugin.py` calls it."""
    register_resolution_hook("handle_gpu_memory_settings")(_size_graphs)
    register_resolution_hook("handle_model_specific_adjustments")(_keep_states)


def _keep_states(server_args: Any, previous: Callable[[Any], None]) -> None:
    if isinstance(server_args, ResolvingServerArgs):
        server_args.before_recurrent_cache()
    previous(server_args)


def _size_graphs(server_args: Any, previous: Callable[[Any], None]) -> None:
    if not isinstance(server_args, ResolvingServerArgs):
        previous(server_args)
        return
    view = resolving_view(server_args)
    memory = get_device_memory_capacity(view.device)
    with _changing_graphs(server_args) as graphs:
        server_args.before_graph_sizes(graphs, view.device, memory)
    previous(server_args)
    with _changing_graphs(server_args) as graphs:
        server_args.after_graph_sizes(graphs)


@contextmanager
def _changing_graphs(server_args: ServerArgs) -> Iterator[Any]:
    decided = resolving_view(server_args).cuda_graph_config
    graphs = copy.deepcopy(decided)
    yield graphs
    if graphs != decided:
        declare_resolution(server_args, "batchllm", cuda_graph_config=graphs)


def resolved(server_args: ServerArgs) -> Any:
    """The arguments by name, as SGLang has decided."""
    return resolving_view(server_args)


def default_of(name: str) -> Any:
    """An argument's default."""
    return next(field.default for field in record_fields(ServerArgs) if field.name == name)


def model_config(server_args: ServerArgs) -> Any:
    """The ModelConfig of the arguments' model."""
    return model_config_of(server_args)


def keeps_states(server_args: ServerArgs) -> bool:
    """Of a model whose layers keep a state, whether the cache here can hold it."""
    return resolving_view(server_args).uses_mamba_radix_cache


def keep_states_by_plan(server_args: ServerArgs) -> None:
    """Choose SGLang's strategy without buffers for the states of layers that keep one. SGLang takes
    it with no overlap only, see `overlap`."""
    declare_resolution(
        server_args,
        "batchllm",
        mamba_radix_cache_strategy="no_buffer",
        disable_overlap_schedule=True,
    )


def overlap(server_args: ServerArgs) -> None:
    """Have steps overlap with their scheduling after SGLang has chosen everything."""
    declare_resolution(server_args, "batchllm", disable_overlap_schedule=False)


def set_decode_backend(server_args: ServerArgs, name: str) -> None:
    """Choose the decode attention backend after SGLang has chosen everything."""
    declare_resolution(server_args, "batchllm", decode_attention_backend=name)


def set_attention_backend(server_args: ServerArgs, name: str) -> None:
    """The same of the one for all attention."""
    declare_resolution(server_args, "batchllm", attention_backend=name)
