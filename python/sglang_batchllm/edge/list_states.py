"""Ids and states of a long list's requests, of which SGLang makes all before it sends the first.

For 20,000 requests that takes longer than a full prefill step, and the GPU has nothing to do and no
other client is served meanwhile. Here the ids are made at once, and the states of a list that comes
in parts slice by slice, as it is sent. Until then a request has one that shows the list, so that
its id is taken and it can be aborted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import ReqState

from sglang_batchllm.edge import seams
from sglang_batchllm.edge.parting import comes_in_parts
from sglang_batchllm.edge.samples import SampledLists

if TYPE_CHECKING:
    from sglang_batchllm.edge.seams.v0_5_17 import front as seam
else:
    seam = seams.load("front")

ID_DIGITS = 32
"""Hexadecimal, as many as SGLang's ids have."""


class ListStates(SampledLists):
    """SGLang's front end, which makes what it keeps of a list's requests as they are sent."""

    def generate_request(self, obj: Any, request: Any = None) -> Any:
        if isinstance(obj, GenerateReqInput) and obj.rid is None:
            obj.rid = new_ids(obj)
        return super().generate_request(obj, request)

    def _init_req_state(self, obj: Any, *args: Any, **options: Any) -> Any:
        if getattr(obj, "is_single", True):
            return super()._init_req_state(obj, *args, **options)
        with self.garbage.made_for_long():
            if self._may_wait(obj):
                return self._reserve(obj)
            return super()._init_req_state(obj, *args, **options)

    def _batch_has_text(self, batch_size: int, obj: Any) -> bool:
        """SGLang asks each request, which it makes for that."""
        has_any = obj.text or (self.is_generation and obj.contains_mm_input())
        return bool(has_any) and super()._batch_has_text(batch_size, obj)

    def _may_wait(self, obj: Any) -> bool:
        """Whether each request of the list passes `make_states` before it is sent, and none has a
        trace, an adapter, or an id that SGLang refuses."""
        return (
            comes_in_parts(obj, obj.batch_size, self.model_config)
            and obj.parallel_sample_num == 1
            and self._should_use_batch_tokenization(obj.batch_size, obj)
            and not (self.enable_trace or any(obj.lora_path or ()))
            and len(set(obj.rid)) == len(obj.rid)
            and self.knows_none(obj.rid)
        )

    def _reserve(self, obj: Any) -> dict[str, Any]:
        """Returns what SGLang's method does, in releases where it returns anything."""
        first: Any = _Slice(obj, [obj[0]])
        super()._init_req_state(first)
        pattern = self.rid_to_state[obj.rid[0]]
        self.rid_to_state.update({rid: _Reserved(obj, pattern) for rid in obj.rid})
        return dict.fromkeys(obj.rid, getattr(pattern, "lifecycle_id", None))

    def make_states(self, requests: Sequence[Any]) -> None:
        """Of these requests of a list, where that has waited. What came since stays noted."""
        known = self.rid_to_state
        waiting = [one for one in requests if isinstance(known.get(one.rid), _Reserved)]
        if not waiting:
            return
        reserved = [known.pop(request.rid) for request in waiting]
        those: Any = _Slice(reserved[0].obj, waiting)
        with self.garbage.made_for_long():
            super()._init_req_state(those)
            for request, state in zip(waiting, reserved, strict=True):
                assert isinstance(state, _Reserved)
                state.become(known[request.rid])
                known[request.rid] = state


class _Reserved(ReqState):
    """The state of a request whose own is not made yet: it shows the list, and else the first
    request's."""

    def __init__(self, whole: Any, pattern: ReqState):
        self.obj = whole
        self._pattern = pattern

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pattern, name)

    def become(self, made: ReqState) -> None:
        fields = vars(made) | {name: getattr(self, name) for name in seam.NOTED}
        self.__class__ = ReqState  # pyright: ignore[reportAttributeAccessIssue]
        self.__dict__ = fields


def new_ids(obj: GenerateReqInput) -> list[str] | None:
    """For a list of which each prompt is asked for one sample; SGLang makes the others."""
    prompts = obj.input_ids if obj.text is None else obj.text
    if not isinstance(prompts, list) or not prompts or isinstance(prompts[0], int):
        return None
    params = obj.sampling_params
    first = params[0] if isinstance(params, list) and params else params
    if isinstance(first, dict) and first.get("n", 1) != 1:
        return None
    digits = os.urandom(len(prompts) * ID_DIGITS // 2).hex()
    return [digits[start : start + ID_DIGITS] for start in range(0, len(digits), ID_DIGITS)]


class _Slice:
    """Some requests of a list, as a list of their own."""

    is_single = False

    def __init__(self, whole: Any, requests: Sequence[Any]):
        self._whole = whole
        self._requests = requests
        self.rid = [request.rid for request in requests]

    def __getitem__(self, index: int) -> Any:
        return self._requests[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)
