"""SGLang's front end: sending may wait, and answers know their request's state."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractContextManager
from typing import Any

from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager

from sglang_batchllm.edge.parting import Sent

NOTED = ("abort_sent",)
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

    async def _send_one_request(self, tokenized_obj: Any) -> None:
        ready = self.due(tokenized_obj)
        if len(ready) == 1:
            await super()._send_one_request(ready[0])
        elif ready:
            await self._send_batch_request(ready)

    async def _send_batch_request(self, tokenized_objs: list[Any]) -> None:
        if not isinstance(tokenized_objs, Sent):
            with self.sending_many():
                await super()._send_batch_request(tokenized_objs)

    async def send_list(self, tokenized: list[Any]) -> None:
        await self._send_batch_request(tokenized)

    def forget(self, rid: str) -> None:
        """A request is not to be sent, and nobody waits for it."""
        del self.rid_to_state[rid]

    def knows_none(self, rids: Iterable[str]) -> bool:
        """Whether SGLang takes these for ids of new requests."""
        return self.rid_to_state.keys().isdisjoint(rids)

    def check_aborted(self, rids: Iterable[str]) -> None:
        """This release does not look whether a request was aborted before it is sent."""

    def all_sent(self, states: Iterable[ReqState]) -> None:
        """Nor does it look after that."""

    def given_up(self, states: Iterable[ReqState]) -> None:
        """Of a list that an error ends, SGLang keeps what was sent until the scheduler has answered
        it. That is told to drop these without a word."""
        for state in states:
            state.dispatched = False

    def stock_answers(self, obj: Any, request: Any, state: ReqState) -> AsyncIterator[Any]:
        return super()._wait_one_response(obj, request)
