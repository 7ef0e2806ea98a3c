"""Where KV lives, as far as the policy has a say in it."""

from __future__ import annotations

from array import array
from typing import Any, Protocol


class Store(Protocol):
    """SGLang's radix tree (`edge.cache`), or a model of one. A prefix is named by a prompt that
    begins with it, the namespace of that prompt, and its tokens."""

    def publish(self, request: Any, /) -> int:
        """Share the prompt tokens of a request (of the engine's own class) that have slots by now,
        and return their number."""
        ...

    def pin(self, tokens: array[int], namespace: str | None, depth: int) -> Any:
        """Hold the cached prefix tokens[:depth] and return a handle to it."""
        ...

    def unpin(self, handle: Any, depth: int, free_from: int | None, last_use: bool) -> None:
        """Let a prefix go. Its KV from token `free_from` on is freed at once unless someone else
        uses it; None leaves it to the cache's own eviction, before all else if this was the
        `last_use` that anybody knows of."""
        ...

    def cached(self, tokens: array[int], namespace: str | None) -> int:
        """Leading tokens of which the KV is cached, held or not."""
        ...

    def locked(self, tokens: array[int], namespace: str | None) -> int:
        """Leading tokens of which the KV is cached and held by somebody."""
        ...

    def hold_text(self, tokens: array[int], namespace: str | None) -> tuple[Any, int]:
        """Hold what is cached of a text; returns a handle and the tokens nobody else holds."""
        ...

    def release_text(self, handle: Any) -> None:
        """Leave the text to the cache's own eviction."""
        ...
