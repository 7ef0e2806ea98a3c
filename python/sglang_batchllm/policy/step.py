"""What an engine and the policy tell each other, each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sglang_batchllm.policy.requests import Request, Turn
from sglang_batchllm.policy.rows import Ask

Mixes = Literal["none", "short", "all"]
"""Which requests may decode in a step that prefills; those with short answers (`admission.short`)
for as long as no others run."""


@dataclass(frozen=True)
class WindowPool:
    """The KV pool of layers that see only the tokens just before. window: tokens that they see, in
    whole pages. capacity: tokens of the pool. slack: tokens that a request may hold beyond its
    window, since what it has left behind is freed only now and then.

    recurrent: of layers that keep a state instead, which is a window of one token. A prefill pass
    leaves the state after its last token alone, so of each prompt it ends where a shared prefix
    does.
    """

    window: int
    capacity: int
    slack: int
    recurrent: bool = False


@dataclass(frozen=True)
class Limits:
    """Of the engine. capacity: tokens of the KV pool. chunk: prompt tokens of a prefill step.
    gather_seconds: how long a lone request waits at most for others. windows: the pool of
    sliding-window or recurrent layers, if they have one; then `capacity` is of the other layers'
    pool."""

    capacity: int
    page_size: int
    chunk: int
    gather_seconds: float
    mixes: Mixes = "none"
    windows: WindowPool | None = None


class Arrival(NamedTuple):
    """A request that comes in. turn: its part in a program that was handed over. shareable: whether
    equal token ids mean equal KV for it, and it is neither invalid nor aborted already. ask: the
    logprobs of its prompt that it wants, None for none."""

    request: Request
    turn: Turn | None
    shareable: bool
    ask: Ask | None = None


@dataclass(frozen=True)
class View:
    """What the engine sees before a step.

    decoding: requests that decode. available: KV tokens that are free or can be evicted.
    max_requests: that may be added. chunk_left: prompt tokens still to compute of those that are
    prefilled in chunks. chunk_next: those of them that the next pass may compute. stepped: a
    forward step has run since the last choice. full: nothing was to be added until a request has
    ended, and none has. window_available: as `available`, of the window pool if there is one.
    rides: nothing that one of those that decode asks for keeps them out of steps that prefill.
    """

    decoding: int
    available: int
    max_requests: int
    chunk_left: int
    chunk_next: int
    stepped: bool
    full: bool
    window_available: int = 0
    rides: bool = True


@dataclass
class Decision:
    """requests: to prefill, in this order. mixed: those that decode may do so in the same step.
    full: nothing is to be added until a request has ended. regrouped: requests that run, and whose
    `shared_path` is another than before."""

    requests: list[Any] = field(default_factory=list)  # of the engine's own class
    regrouped: list[Any] = field(default_factory=list)
    mixed: bool = False
    full: bool = False
