"""A replica: an actor of Ray's with an engine, which answers a partition as one list."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import orjson
from ray.llm._internal.batch.stages.sglang_engine_stage import SGLangEngineStageUDF

from sglang_batchllm.edge.engine_backend import EngineBackend
from sglang_batchllm.ray_data.partitions import ERROR, Row, prompt_of, unpack
from sglang_batchllm.wire.lines import (
    MAX_BYTES,
    MAX_LINE_BYTES,
    MAX_REQUESTS,
    Reply,
    chunks,
    read_answers,
    request_line,
)
from sglang_batchllm.wire.request_ids import new_batch_id


class Replica(SGLangEngineStageUDF):
    """Ray's stage, which starts the engine and gives rows the columns of Ray's; the rows come as
    partitions, and an answer has ``num_cached_tokens`` beside."""

    def __init__(
        self,
        data_column: str,
        expected_input_keys: list[str],
        lists: int,
        should_continue_on_error: bool,
        **options: Any,
    ):
        """lists: partitions that are answered at a time. options: Ray's."""
        super().__init__(data_column, expected_input_keys, **options)
        self._lists = lists
        self._continues = should_continue_on_error
        self._backend = EngineBackend(self.llm.engine)

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        if not len(batch[self.data_column]):
            return
        rows = unpack(batch[self.data_column])
        async for answered in super().__call__({self.data_column: rows}):
            yield answered

    async def udf(self, batch: list[Row]) -> AsyncIterator[Row]:
        """Yields, in order, what the rows get. Raises RuntimeError for the first that failed,
        unless these are to have error rows."""
        batch_uuid, started = uuid.uuid4().hex, time.perf_counter()
        replies = await asyncio.to_thread(self._replies, batch)
        seconds = time.perf_counter() - started
        for number, (row, reply) in enumerate(zip(batch, replies, strict=True)):
            output = output_of(row, reply)
            if output[ERROR] and not self._continues:
                raise RuntimeError(
                    f"a row failed: {output[ERROR]}; leave should_continue_on_error on to get an "
                    "error row for it"
                )
            yield output | {
                "request_id": number,
                self.IDX_IN_BATCH_COLUMN: row[self.IDX_IN_BATCH_COLUMN],
                "batch_uuid": batch_uuid,
                "time_taken_llm": seconds,
                "params": str(row.pop("sampling_params", None)),
            }

    def _replies(self, rows: Sequence[Row]) -> list[Reply]:
        replies: dict[int, Reply] = {}
        lines: list[tuple[int, bytes]] = []
        for number, row in enumerate(rows):
            try:
                lines.append((number, line_of(row)))
            except ValueError as error:
                replies[number] = Reply(400, {"error": {"message": str(error)}})
        for part in parts(lines, MAX_REQUESTS // self._lists, MAX_BYTES // self._lists):
            body = chunks(line for _, line in part)
            for answer in read_answers(self._backend.hand_over(new_batch_id(), body)):
                if answer is not None:
                    replies[part[answer[0]][0]] = answer[1]
        return [replies[number] for number in range(len(rows))]


def parts(
    lines: Sequence[tuple[int, bytes]], most: int, most_bytes: int
) -> Iterator[Sequence[tuple[int, bytes]]]:
    """All lines together, unless that is more than an engine takes in one list."""
    start = size = 0
    for end, (_, line) in enumerate(lines):
        if end - start == most or size + len(line) > most_bytes:
            yield lines[start:end]
            start, size = end, 0
        size += len(line)
    if lines:
        yield lines[start:]


def line_of(row: Row) -> bytes:
    """The row's request. Raises ValueError where it can't be sent."""
    prompt = prompt_of(row)
    if prompt is None:
        raise ValueError("the row has no tokenized_prompt; leave tokenize_stage on, or give it one")
    # Ray gives every row the fields that any row has.
    params = row.get("sampling_params") or {}
    params = {name: value for name, value in params.items() if value is not None}
    try:
        body = orjson.dumps(
            {"input_ids": prompt, "sampling_params": params},
            default=lambda value: value.tolist(),  # arrays of texts
            option=orjson.OPT_SERIALIZE_NUMPY,
        )
    except TypeError as error:
        raise ValueError(f"sampling_params can't be sent: {error}") from None
    line = request_line(0, body, more=False)
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the request has {len(line)} bytes; an engine takes {MAX_LINE_BYTES}")
    return line


def output_of(row: Row, reply: Reply) -> Row:
    """The columns that a row gets: with `ERROR` those of an answer are empty."""
    content = reply.content
    prompt = row.pop("tokenized_prompt", None)
    output = {
        "prompt": row.get("prompt"),
        "prompt_token_ids": prompt,
        "num_input_tokens": 0,
        "num_cached_tokens": 0,
        "generated_tokens": None,
        "generated_text": None,
        "num_generated_tokens": 0,
        "metrics": None,
        ERROR: "",
    }
    if reply.status_code != 200:
        error = content.get("error", content)
        return output | {ERROR: f"status {reply.status_code}: {error.get('message', error)}"}
    facts = content["meta_info"]
    if facts["finish_reason"]["type"] == "abort":
        return output | {ERROR: f"aborted: {facts['finish_reason'].get('message', 'no reason')}"}
    return output | {
        "num_input_tokens": facts["prompt_tokens"],
        "num_cached_tokens": facts["cached_tokens"],
        "generated_tokens": content.get("output_ids"),
        "generated_text": content["text"],
        "num_generated_tokens": facts["completion_tokens"],
    }
