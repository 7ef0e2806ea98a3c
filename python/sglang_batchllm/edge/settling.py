"""Steps whose results are looked at before the next is chosen, although steps overlap.

Of a request that ends at a stop token, the step that is launched before that is known takes the
token into the recurrent state, which can't be taken back. A program goes on without the token, and
would find no state to go on from. So while a request runs that a program is to continue, results
come first, as without overlap.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import ScheduleBatch

from sglang_batchllm.edge import seams

if TYPE_CHECKING:
    from sglang_batchllm.edge.seams.v0_5_17.scheduler import QueueingScheduler
else:
    QueueingScheduler = seams.load("scheduler").QueueingScheduler

_SETTLED: Any = object()
"""In place of a result that has been processed."""

_NOBODY: Any = SimpleNamespace(reqs=[])


class SettlingScheduler(QueueingScheduler):
    result_queue: deque[tuple[ScheduleBatch, Any]]

    def settles(self) -> bool:
        """Whether the last step's result has to be known before the next step is chosen."""
        raise NotImplementedError

    def get_next_batch_to_run(
        self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> Any:
        if self.enable_overlap and last_batch is not None and self.settles():
            batch, result = self.result_queue.popleft()
            self.process_batch_result(batch, result)
            self.result_queue.append((_NOBODY, _SETTLED))  # SGLang takes it off
        return super().get_next_batch_to_run(running_batch, last_batch)

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        if result is not _SETTLED:
            super().process_batch_result(batch, result)
