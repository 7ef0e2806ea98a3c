"""SGLang's front end: requests are sent at once, and answers looked up when they are asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractContextManager
from typing import Any

from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager

from sglang_batchllm.edge.parting import Sent

NOTED = ("abort_requested", "lifecycle_id")
"""Fields of a request's state that may change, or be known elsewhere, before it is sent."""


class SendingManager(TokenizerManager):
    """A front end whose requests can be taken before they are sent."""

    def due(self, tokenized: Any) -> list[Any]:
        """What is to be sent now that this request is ready: it alone, nothing where it is taken or
        others are to come first, or a list."""
        raise NotImplementedError

    def sending_many(self) -> AbstractContextManager[None]:
        """Around sending a list."""
        raise NotImplementedError

    def _send_one_request(self, tokenized_obj: Any) -> None:
        ready = self.due(tokenized_obj)
        if len(ready) == 1:
            super()._send_one_request(ready[0])
        elif ready:
            self._send_batch_request(ready)

    def _send_batch_request(self, tokenized_objs: list[Any]) -> None:
        if not isinstance(tokenized_objs, Sent):
            with self.sending_many():
                super()._send_batch_request(tokenized_objs)

    async def send_list(self, tokenized: list[Any]) -> None:
        self._send_batch_request(tokenized)

    def forget(self, rid: str) -> None:
        """A request is not to be sent, and nobody waits for it."""
        self._remove_req_state(rid)

    def knows_none(self, rids: Iterable[str]) -> bool:
        """Whether SGLang takes these for ids of new requests."""
        known = self.rid_to_state, self.logical_rid_to_child_rids, self.child_rid_to_logical_rid
        return all(ids.keys().isdisjoint(rids) for ids in known)

    def check_aborted(self, rids: Iterable[str]) -> None:
        """Raises where a request that is not sent yet has been aborted."""
        for rid in rids:
            self._raise_if_logical_rid_aborted(rid)

    def all_sent(self, states: Iterable[ReqState]) -> None:
        """Aborts that came after a request was sent are with the scheduler. SGLang looks for them
        once more, and would end the whole list."""
        for state in states:
            state.abort_requested = False

    def given_up(self, states: Iterable[ReqState]) -> None:
        """SGLang forgets every request of a list that an error ends."""

    def stock_answers(self, obj: Any, request: Any, state: ReqState) -> AsyncIterator[Any]:
        """SGLang's generator, which looks the state up once it is asked; by then it may be gone."""
        view: Any = _StateView(self, {obj.rid: state})
        return super()._wait_one_response.__func__(view, obj, request)  # type: ignore[attr-defined]


class _StateView:
    """The front end as it was when a request was sent."""

    def __init__(self, manager: TokenizerManager, rid_to_state: dict[str, ReqState]):
        self._manager = manager
        self.rid_to_state = rid_to_state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)
