"""The hand-overs that are open in a process."""

from __future__ import annotations

from sglang_batchllm.server.body import Room, Share
from sglang_batchllm.server.errors import RefusedError
from sglang_batchllm.server.front import FrontEnd
from sglang_batchllm.server.handover import HandOver
from sglang_batchllm.wire.request_ids import RequestId, is_batch_id, parse_request_id


class Registry:
    """One of each front end. Ids carry no rights: who is a later turn of whom is said here."""

    def __init__(self, front: FrontEnd, room: Room | None = None):
        self.front = front
        self._room = room or Room()
        self._open: dict[str, HandOver] = {}

    def begin(self, batch: str, yields: bool = False) -> HandOver:
        """A new hand-over, which is open until it is abandoned.

        batch: an id of `wire.request_ids.new_batch_id`. yields: all others go first. Raises
        RefusedError for any other id (400) and for one that is in use (409).
        """
        if not is_batch_id(batch):
            raise RefusedError(400, "a batch id is 32 hexadecimal digits in lower case")
        if batch in self._open:
            raise RefusedError(409, f"batch {batch} is in use; take a new id for each hand-over")
        handover = HandOver(self.front, batch, yields, Share(self._room), self._open)
        self._open[batch] = handover
        return handover

    def end_programs(self, batch: str, programs: dict[int, bool]) -> None:
        """These programs of a batch send no more requests: what is held for them may go. Raises
        RefusedError (404) for a batch that is not open.

        programs: whether each of them sent more than its first requests.
        """
        if batch not in self._open:
            raise RefusedError(404, "no batch of this id is open here: it has ended, or never was")
        self._open[batch].end_programs(programs)

    def later_turn(self, rid: str | None) -> RequestId | None:
        """Who sends the request with this id, if it is a program that goes on."""
        asked = parse_request_id(rid)
        if asked is None or asked.turn != "later":
            return None
        handover = self._open.get(asked.batch)
        return asked if handover is not None and handover.goes_on(asked.program) else None
