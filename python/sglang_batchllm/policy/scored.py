"""What a request that is planned may leave to others, and read of them: logprobs of its prompt."""

from __future__ import annotations

from sglang_batchllm.policy.batch import member_of
from sglang_batchllm.policy.requests import Request
from sglang_batchllm.policy.rows import Ask, Rows


def scores(request: Request) -> bool:
    """Whether the request may leave rows for others, or read some."""
    member = member_of(request)
    return member is not None and (member.lead is not None or member.ask is not None)


def rows_to_leave(request: Request) -> tuple[Ask, list[Rows]] | None:
    """What the request's next prefill leaves for others, to be filled: from where on it needs
    which logprobs for that, and the rows. To be asked before `BatchPolicy.launched`."""
    member = member_of(request)
    if member is None or member.lead is None:
        return None
    return member.lead.ask, [*member.lead.rows.values()]


def rows_to_read(request: Request) -> list[Rows]:
    """What has been left of the request's prompt, from its beginning; filled once the steps that
    are launched by now have ended. To be asked before `BatchPolicy.launched`."""
    member = member_of(request)
    if member is None or member.ask is None or member.batch is None:
        return []
    return [] if member.batch.scoring is None else member.batch.scoring.kept(member)


def was_scored(request: Request) -> None:
    """The request has been given the logprobs of its prompt, and needs no more."""
    member = member_of(request)
    if member is not None:
        member.ask = None


def prefix_limit(request: Request) -> int | None:
    """Prompt tokens that a planned request may find in the cache at most, since it has to compute
    logprobs of the others; None for as many as there are."""
    member = member_of(request)
    if member is None or member.batch is None:
        return None
    return member.batch.prefix_limit(member)
