"""What computes logprobs of prompts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import torch
from sglang.srt.layers.logprob_processor import LogprobResult
from sglang.srt.managers.schedule_batch import Req

from sglang_batchllm.edge.transfers import to_device, to_host

SLICE = 2048
"""Rows whose logits are there at once, as in SGLang."""


def reads_few_positions(req: Req) -> bool:
    """Whether the request is scored at positions of its own; none is, unless the server says so."""
    return False


class _Arriving:
    """The logprobs of the likeliest tokens, or of asked ones, while they are on their way."""

    def __init__(self, values: list[torch.Tensor], lists: Callable[[list[Any]], list[Any]]):
        self._values = [to_host(value) for value in values]
        self._lists = lists

    def arrived(self) -> list[Any]:
        return self._lists(list(chain.from_iterable(value.tolist() for value in self._values)))


def compute_rows(
    original: Callable[..., Any], processor: Any, arguments: dict[str, Any]
) -> tuple[Any, torch.Tensor]:
    """The logprobs of a pass's input rows, and the logits of its sampled rows, without waiting for
    the GPU: which rows and tokens are meant is known before, and what SGLang has as lists arrives
    with the rest of the result (`finalize`). SGLang waits several times for every pass."""
    head, metadata = arguments["lm_head"], arguments["logits_metadata"]
    if arguments["skip_chunking_for_dp_attn"] or hasattr(head, "set_lm_head_pass"):
        return original(processor, **arguments)
    states, rows = arguments["pruned_states"], arguments["input_logprob_indices"]
    tokens = metadata.extend_input_logprob_token_ids_gpu
    counts = [max(count, 0) for count in metadata.extend_logprob_pruned_lens_cpu]

    def logits_of(places: torch.Tensor) -> torch.Tensor:
        return arguments["get_logits_fn"](states[places], head, metadata, use_logits_buffer=False)

    sampled = logits_of(arguments["sample_indices"])
    asked = metadata.token_ids_logprobs if metadata.extend_token_ids_logprob else []
    ids_of_rows = chain.from_iterable(map(repeat, asked, counts))
    pairs = [(row, token) for row, ids in enumerate(ids_of_rows) for token in ids or ()]
    most = max(metadata.top_logprobs_nums) if metadata.extend_return_top_logprob else 0
    chosen, tops, top_ids, of_ids = [states.new_empty(0, dtype=sampled.dtype)], [], [], []
    for start in range(0, len(rows), SLICE):
        part = slice(start, start + SLICE)
        logprobs = torch.log_softmax(logits_of(rows[part]), dim=-1)
        chosen.append(logprobs.gather(1, tokens[part, None]).squeeze(1))
        if most:
            values, ids = logprobs.topk(most, dim=1)
            tops.append(values)
            top_ids.append(ids)
        inside = [(row - start, token) for row, token in pairs if part.start <= row < part.stop]
        if inside:
            of_row, token = to_device([*chain(*inside)], states.device).view(-1, 2).T
            of_ids.append(logprobs[of_row, token])
    result = LogprobResult(token_logprobs=torch.cat(chosen))
    if metadata.extend_return_top_logprob:
        nums = metadata.top_logprobs_nums

        def by_request(values: list[Any]) -> list[Any]:
            remaining = iter(values)
            return [
                [next(remaining)[:num] for _ in range(count)]
                for num, count in zip(nums, counts, strict=True)
            ]

        result.top_logprobs_val = _Arriving(tops, by_request)  # type: ignore[assignment]
        result.top_logprobs_idx = _Arriving(top_ids, by_request)  # type: ignore[assignment]
    if metadata.extend_token_ids_logprob:

        def by_id(values: list[Any]) -> list[Any]:
            remaining = iter(values)
            return [
                [[next(remaining) for _ in ids] for _ in range(count)] if ids is not None else []
                for ids, count in zip(asked, counts, strict=True)
            ]

        result.token_ids_logprobs_val = _Arriving(of_ids, by_id)  # type: ignore[assignment]
        result.token_ids_logprobs_idx = [
            [*repeat(ids, count)] if ids is not None else []
            for ids, count in zip(asked, counts, strict=True)
        ]
    return result, sampled


def finalize(output: Any) -> None:
    """Have the logprobs of a pass's input be lists, once they are there."""
    for name in (
        "input_top_logprobs_val",
        "input_top_logprobs_idx",
        "input_token_ids_logprobs_val",
    ):
        value = getattr(output, name)
        if isinstance(value, _Arriving):
            setattr(output, name, value.arrived())
