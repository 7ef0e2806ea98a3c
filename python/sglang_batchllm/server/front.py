"""SGLang's front end, as far as a hand-over needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sglang_batchllm.wire.lines import Reply

Request = Any
"""A request as `FrontEnd.read` made it; only a front end looks inside."""

Prepared = Any
"""A request that has been checked and tokenized, as the scheduler takes it."""


class FrontEnd(Protocol):
    def read(self, url: str, body: object) -> Request:
        """The request in a decoded JSON body of one of `wire.lines.URLS`. Raises what that raises
        for any other value."""
        ...

    def untokenized(self, request: Request) -> int:
        """Characters that `tokenize` would tokenize."""
        ...

    def tokenize(self, requests: Sequence[Request]) -> None:
        """Replace the texts of requests by token ids, all in one call of the tokenizer. Texts that
        it refuses stay, for `answer` to say why."""
        ...

    async def answer(self, request: Request, rid: str, take: Callable[[Prepared], None]) -> Reply:
        """Run a request as its URL does, and return its answer; that of ``/generate`` is what
        SGLang's client reads of it. Raises what the URL answers with an error. Once the request is
        prepared it goes to `take`, where SGLang would send it to the scheduler; one that stands for
        several (a list, several samples) goes to the scheduler by itself.

        Cancelling the call aborts the request.
        """
        ...

    async def send(
        self,
        batch: str,
        requests: Sequence[Prepared],
        turns: dict[str, tuple[str, int]],
        yields: bool,
    ) -> None:
        """Send requests to the scheduler, which plans them together. turns, yields: see
        `messages.NameTurns`."""
        ...

    def release(self, batch: str, programs: dict[int, bool] | None = None) -> None:
        """See `messages.ReleaseTexts`."""
        ...

    def is_preparing(self) -> bool:
        """Whether it works on requests that are not prepared. Not so while it only keeps them."""
        ...

    def settle(self) -> None:
        """A slice of them has come. What lives now will for long."""
        ...

    def tidy(self) -> None:
        """All of them have gone."""
        ...

    async def internal_states(self) -> list[dict[str, Any]]:
        """What the scheduler says of itself, one of each data-parallel replica."""
        ...
