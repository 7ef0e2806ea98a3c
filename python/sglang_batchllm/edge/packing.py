"""A list's one message, which says once what its requests have in common.

SGLang pickles each request with all its fields, some 60 of them, and its token ids as an object.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from sglang.srt.managers.io_struct import (
    _USE_PICKLE_IPC,
    BaseReq,
    BatchTokenizedGenerateReqInput,
    TokenizedGenerateReqInput,
)

from sglang_batchllm.policy.parts import Part
from sglang_batchllm.policy.shards import Shard

APART = ("sampling_params", "time_stats")
"""Fields of which each request needs an object of its own: the scheduler writes to it."""


class PackedList(BaseReq, kw_only=True):
    """Requests, field by field.

    tokens: the token ids of all prompts, one after the other, of the NumPy type `dtype`. lengths:
    of each prompt. common: the value of a field that is equal for all. columns: the values of the
    others, one for each request. part: of a list that comes in several. shard: of one that goes to
    several replicas. gather: they are to be planned with what other calls send.
    """

    tokens: bytes
    dtype: str
    lengths: list[int]
    common: dict[str, Any]
    columns: dict[str, list[Any]]
    part: Part | None = None
    shard: Shard | None = None
    gather: bool = False


def packed(
    batch: BatchTokenizedGenerateReqInput,
    part: Part | None = None,
    shard: Shard | None = None,
    gather: bool = False,
) -> PackedList | BatchTokenizedGenerateReqInput:
    """The list in less space; as it is where prompts are more than token ids, or where messages are
    no pickles. part: of a longer list, for which neither is the case. shard: of one that goes to
    several replicas. gather: see `PackedList`."""
    requests: list[TokenizedGenerateReqInput] = batch.batch
    if not _USE_PICKLE_IPC:
        return batch
    prompts = [
        request.input_ids
        for request in requests
        if request.input_ids is not None and request.mm_inputs is None
    ]
    if len(prompts) < len(requests):
        return batch
    tokens = np.frombuffer(b"".join(prompts), np.int64)
    if len(tokens) and np.iinfo(np.int32).min <= tokens.min() <= tokens.max() < 1 << 31:
        tokens = tokens.astype(np.int32)
    common: dict[str, Any] = {}
    columns: dict[str, list[Any]] = {}
    for field in TokenizedGenerateReqInput.__struct_fields__:
        if field == "input_ids":
            continue
        values = [getattr(request, field) for request in requests]
        if _equal(field, values):
            common[field] = values[0]
        else:
            columns[field] = values
    return PackedList(
        tokens=tokens.tobytes(),
        dtype=tokens.dtype.name,
        lengths=[*map(len, prompts)],
        common=common,
        columns=columns,
        part=part,
        shard=shard,
        gather=gather,
    )


def end_of_list(name: str) -> PackedList:
    """What is missing of a list that comes in parts never comes."""
    return _without_requests(Part(name, last=True))


def emptied(message: PackedList) -> PackedList:
    """The same part of the list, without its requests."""
    return _without_requests(message.part)


def _without_requests(part: Part | None) -> PackedList:
    return PackedList(tokens=b"", dtype="int32", lengths=[], common={}, columns={}, part=part)


def ids_in(message: PackedList) -> Sequence[str]:
    """The ids of its requests."""
    if len(message.lengths) == 1:
        return [message.common["rid"]]
    return message.columns.get("rid", [])


def unpacked(message: PackedList) -> BatchTokenizedGenerateReqInput:
    """The list as SGLang has it."""
    tokens = np.frombuffer(message.tokens, message.dtype).astype(np.int64)
    view = tokens.view(np.uint8).data
    requests = []
    start = 0
    for index, length in enumerate(message.lengths):
        input_ids = array("q")
        input_ids.frombytes(view[start : start + length * input_ids.itemsize])
        start += length * input_ids.itemsize
        fields = message.common | {name: column[index] for name, column in message.columns.items()}
        for field in APART:
            fields[field] = copy.copy(fields[field])
        requests.append(TokenizedGenerateReqInput(input_ids=input_ids, **fields))
    return BatchTokenizedGenerateReqInput(batch=requests)


def _equal(field: str, values: Sequence[Any]) -> bool:
    first = values[0]
    if field == "time_stats":  # compared as they travel: without their times
        if any(value is None for value in values):
            return all(value is None for value in values)
        state = first.__getstate__()
        return all(value.__getstate__() == state for value in values)
    return all(
        value is first or (type(value) is type(first) and value == first) for value in values
    )
