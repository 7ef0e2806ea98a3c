"""How many prompt tokens had to be computed, over all requests that ever ran."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Hashable

import numpy as np

PENDING_TOKENS = 1 << 22
"""Prompts are kept as they are, to be entered when there is nothing else to do (`rest`), until so
many tokens have come, 32 MiB: entering a prompt takes about 10 us."""

REST_PROMPTS = 256
"""Prompts to enter before something else may come."""

MAX_TOKENS = 1 << 24
"""Distinct tokens that are remembered, 64 MiB; then all are forgotten, and what is counted from
there on is what must be computed by somebody who forgot."""


class _Node:
    """An edge of whole pages, int32[n], and what follows it by the first page of that."""

    __slots__ = ("children", "tokens")

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens
        self.children: dict[bytes, _Node] = {}


class DistinctTokens:
    """Counts prompt tokens that must be computed when nothing is computed twice, in the best order.

    Equal whole pages after equal beginnings count once; of a prompt that ends where another has
    ended, the last token is computed all the same, and so its page.
    """

    def __init__(self, page_size: int):
        self._page_size = page_size
        self._pending: deque[tuple[Hashable, array[int]]] = deque()
        self._pending_tokens = 0
        self._tokens = 0
        self._forget()

    def add(self, prompt: array[int], namespace: Hashable) -> None:
        """A prompt (token ids) has run; those of other namespaces share nothing with it."""
        self._pending.append((namespace, prompt))
        self._pending_tokens += len(prompt)
        while self._pending_tokens > PENDING_TOKENS:
            self._enter_oldest()

    def rest(self) -> None:
        """There is nothing else to do for some milliseconds."""
        for _ in range(min(REST_PROMPTS, len(self._pending))):
            self._enter_oldest()

    def count(self) -> int:
        """Over all prompts so far."""
        while self._pending:
            self._enter_oldest()
        return self._tokens

    def _enter_oldest(self) -> None:
        namespace, prompt = self._pending.popleft()
        self._pending_tokens -= len(prompt)
        self._tokens += self._enter(namespace, np.asarray(prompt, np.int32))

    def _forget(self) -> None:
        self._roots: dict[Hashable, _Node] = {}
        self._ends: set[int] = set()
        self._remembered = 0

    def _enter(self, namespace: Hashable, prompt: np.ndarray) -> int:
        page = self._page_size
        whole = len(prompt) // page * page
        tail = len(prompt) - whole
        pages = prompt[:whole]
        if self._remembered > MAX_TOKENS:
            self._forget()
        new = self._insert(self._roots.setdefault(namespace, _Node(prompt[:0])), pages)
        self._remembered += new
        if tail:
            return new + tail
        end = hash((namespace, pages.tobytes()))
        again = end in self._ends
        self._ends.add(end)
        return new + page * again

    def _insert(self, node: _Node, pages: np.ndarray) -> int:
        page = self._page_size
        at = 0
        while at < len(pages):
            key = pages[at : at + page].tobytes()
            child = node.children.get(key)
            if child is None:
                node.children[key] = _Node(pages[at:].copy())
                return len(pages) - at
            ahead = pages[at : at + len(child.tokens)]
            same = child.tokens[: len(ahead)] == ahead
            equal = len(ahead) if same.all() else int(same.argmin()) // page * page
            if equal < len(child.tokens):
                upper = _Node(child.tokens[:equal])
                child.tokens = child.tokens[equal:]
                upper.children[child.tokens[:page].tobytes()] = child
                node.children[key] = child = upper
            node, at = child, at + equal
        return 0
