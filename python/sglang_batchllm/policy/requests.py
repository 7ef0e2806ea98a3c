"""What the policy asks of a request."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

End = Literal["stop", "length", "abort"]
"""How a request ended: by itself, cut off at its max_new_tokens, or not at all as it should."""


class Sampling(Protocol):
    @property
    def max_new_tokens(self) -> int | None: ...


class Request(Protocol):
    """A request of the engine's; token ids are integers, lengths are tokens.

    cached_tokens: prompt tokens that were in the cache when it first ran, negative before.
    already_computed: tokens from the prompt's start that have KV, cached ones included.
    """

    @property
    def rid(self) -> str: ...
    @property
    def origin_input_ids(self) -> array[int]: ...
    @property
    def output_ids(self) -> Sequence[int]: ...
    @property
    def extra_key(self) -> str | None: ...
    @property
    def sampling_params(self) -> Sampling: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def already_computed(self) -> int: ...


class Turn(NamedTuple):
    """A request's part in a program that was handed over with others.

    kind: "once" if nothing will continue the request's text, else "first" for one of the list that
    was handed over and "later" for one that came by itself. batch: the list's name. program: which
    of its programs asks. yields: all others go first.
    """

    kind: Literal["once", "first", "later"]
    batch: str
    program: int
    yields: bool = False
