"""A window of rows becomes one row for each replica, which holds the rows of its partition."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Iterable
from typing import Any

import numpy as np
from ray.llm._internal.batch.stages.base import StatefulStageUDF

from sglang_batchllm.jobs.shards import UNSAID_OUTPUT
from sglang_batchllm.planning import partition, plan_batch
from sglang_batchllm.policy.admission.outputs import MAX_EXPECTED_OUTPUT

Row = dict[str, Any]

PACKED = "partition"
"""The column of a partition's rows, which Ray would spread over replicas as it likes."""

ERROR = "__inference_error__"
"""Ray's column for why a row failed; empty where it did not."""


class PlanWindow(StatefulStageUDF):
    """Cuts each batch, which is a window, into as many partitions as there are replicas."""

    def __init__(
        self, data_column: str, expected_input_keys: list[str], replicas: int, page_size: int
    ):
        super().__init__(data_column, expected_input_keys)
        self._replicas = replicas
        self._page_size = page_size

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        if not len(batch[self.data_column]):
            return
        rows = [*batch[self.data_column]]
        for mine in partitions(rows, self._replicas, self._page_size):
            yield {self.data_column: [{PACKED: pack(mine)}]}


def partitions(rows: list[Row], replicas: int, page_size: int) -> list[list[Row]]:
    """The rows of each partition, in their order; those without rows are left out.

    Rows have ``tokenized_prompt``, int[m], and ``sampling_params``. A row that can't be planned is
    in the first partition, whose replica says why.
    """
    shard_of = np.zeros(len(rows), np.int64)
    planned = [number for number, row in enumerate(rows) if prompt_of(row) is not None]
    if planned:
        prompts = [prompt_of(rows[number]) for number in planned]
        outputs = np.array([expected_output(rows[number]) for number in planned])
        plan = plan_batch(prompts, page_size, outputs)  # type: ignore[arg-type]
        shard_of[planned] = partition(plan, replicas, outputs).shard_of
    found = ([rows[i] for i in np.flatnonzero(shard_of == shard)] for shard in range(replicas))
    return [mine for mine in found if mine]


def prompt_of(row: Row) -> np.ndarray | None:
    """Its token ids; None where there are none, or where an earlier stage has given it up."""
    if row.get(ERROR) or row.get("tokenized_prompt") is None or not len(row["tokenized_prompt"]):
        return None
    return np.asarray(row["tokenized_prompt"], np.int32)


def expected_output(row: Row) -> int:
    """Tokens that the row is taken to decode."""
    said = (row.get("sampling_params") or {}).get("max_new_tokens")
    if isinstance(said, int) and said > 0:
        return min(said, MAX_EXPECTED_OUTPUT)
    return UNSAID_OUTPUT


def pack(rows: list[Row]) -> bytes:
    for row in rows:
        if (prompt := prompt_of(row)) is not None:
            row["tokenized_prompt"] = prompt
    return pickle.dumps(rows, pickle.HIGHEST_PROTOCOL)


def unpack(packed: Iterable[Row]) -> list[Row]:
    return [row for one in packed for row in pickle.loads(one[PACKED])]
