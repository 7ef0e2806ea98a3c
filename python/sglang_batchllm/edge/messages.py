"""Messages of ours from a tokenizer process to the scheduler."""

from __future__ import annotations

from sglang.srt.managers.io_struct import BaseReq


class NameTurns(BaseReq, kw_only=True):
    """The requests that follow belong to programs of a hand-over. Only a hand-over sends this; ids
    in a client's hands carry no rights.

    turns: for each request id the turn ("once" if nothing continues its text, "first", or "later"
    for one that came by itself) and the program that asks. yields: all others go first. replica:
    to which they go, where there are several.
    """

    batch: str
    turns: dict[str, tuple[str, int]]
    yields: bool = False
    replica: int | None = None


class ReleaseTexts(BaseReq, kw_only=True):
    """Programs of a batch have ended, or all have.

    programs: whether each of them sent more than its first requests; None for all.
    """

    batch: str
    programs: dict[int, bool] | None = None


class AbortList(BaseReq, kw_only=True):
    """These requests are aborted in one pass.

    rids: exact request ids. awaited: those of which somebody waits for the answer that they were
    aborted.
    """

    rids: list[str]
    awaited: set[str]
