"""Logprobs of prompts: a leader's pass computes what all who share its tokens ask, once.

SGLang computes them from `logprob_start_len` on, and therefore lets no request that asks for them
begin after that. Here one may begin later, where the rows before that are kept (`policy.rows`):
`limit_prefix` says from where. A prefill pass of which a request leaves rows is widened to the
union that others ask, by its batch's own fields; from its result the rows are taken, it is narrowed
to what its requests asked themselves, and requests that began later get the rows before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch
from sglang.srt.server_args import ServerArgs

from sglang_batchllm.edge import seams
from sglang_batchllm.edge.transfers import pinned, to_device, to_host
from sglang_batchllm.policy.rows import Ask, RowLists, Rows
from sglang_batchllm.policy.scored import prefix_limit, rows_to_leave, rows_to_read, scores

if TYPE_CHECKING:
    from sglang_batchllm.edge.seams.v0_5_17 import scoring as seam
else:
    seam = seams.load("scoring")

logger = logging.getLogger(__name__)


def refusal(model: torch.nn.Module, server_args: ServerArgs) -> str | None:
    """Why logprobs of prompts can not be shared, if they can not."""
    if server_args.enable_mis:
        return "multi-item scoring is on"
    if hasattr(getattr(model, "lm_head", None), "set_lm_head_pass"):
        return "LoRA adapters may change the model's head"
    return None


def ask_of(req: Req) -> Ask | None:
    """What the request asks of its prompt's tokens. The first token has no logprob, and the row of
    the last one tells of the answer, so there may be nothing although `return_logprob` is set."""
    start = req.logprob_start_len
    if not req.return_logprob or not 0 <= start < len(req.origin_input_ids) - 1:
        return None
    if seam.reads_few_positions(req):
        return None
    return Ask(start, req.logprob.top_logprobs_num, tuple(req.logprob.token_ids_logprob or ()))


def limit_prefix(original: Callable[..., int], req: Req, input_len: int) -> int:
    """How much of its prompt a request may find in the cache, around SGLang's own answer."""
    limit = prefix_limit(req)
    if limit is None:
        if not _is_scored(req):
            return original(req, input_len)
        limit = input_len  # it was retracted after it had got all logprobs of its prompt
    elif not scores(req) and not _is_scored(req):
        limit = min(limit, original(req, input_len))  # who shares no logprobs computes its own
    return max(min(limit, input_len - 1), 0)


def _is_scored(req: Req) -> bool:
    return req.logprob is not None and req.logprob.input_token_logprobs_val is not None


class _Part:
    """One request of a prefill pass, which computes prompt tokens [begin, end).

    own: what it asks itself, from the position on at which SGLang would begin. wide: that together
    with what it leaves; leaves: the rows for others. reads: those that others have left it.
    """

    def __init__(self, batch: ScheduleBatch, index: int):
        self.req: Req = batch.reqs[index]
        self.begin: int = batch.prefix_lens[index]
        self.end: int = self.begin + batch.extend_lens[index]
        ids = tuple(self.req.logprob.token_ids_logprob or ()) if self.req.return_logprob else ()
        top = self.req.logprob.top_logprobs_num if self.req.return_logprob else 0
        self.own = Ask(self.begin + batch.extend_logprob_start_lens[index], top, ids)
        self.wide, self.leaves = self.own, list[Rows]()
        leave = rows_to_leave(self.req)
        if leave is not None:
            ask, left = leave
            self.leaves = [r for r in left if r.start < self.end and r.stop > self.begin]
            if self.leaves:
                self.wide = Ask(
                    max(min(self.own.start, ask.start), self.begin),
                    max(self.own.top, ask.top),
                    tuple(dict.fromkeys(ids + ask.ids)),
                )
        self.reads = rows_to_read(self.req)

    @property
    def wide_tokens(self) -> list[int]:
        """The token after each row, 0 where none is."""
        tokens = self.req.origin_input_ids[self.wide.start + 1 : self.end + 1].tolist()
        return tokens + [0] * (self.end - self.wide.start - len(tokens))


class ScoredStep:
    """A prefill pass that computes rows for others, or of which requests read some."""

    def __init__(self, batch: ScheduleBatch, parts: list[_Part]):
        self.batch = batch
        self._parts = parts
        self._widens = any(part.wide != part.own for part in parts)
        # The last row of a node tells of every token that follows it.
        pruned = [max(part.end - part.wide.start, 1) for part in parts]
        self._last_rows = [
            (at + rows.stop - 1 - part.wide.start, rows)
            for part, at in zip(parts, accumulate(pruned, initial=0), strict=False)
            for rows in part.leaves
            if rows.following and part.wide.start < rows.stop <= part.end
        ]
        self._following: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: ScheduleBatch) -> ScoredStep | None:
        """Before the policy is told that the batch is launched."""
        if not any(map(scores, batch.reqs)):
            return None
        return cls(batch, [_Part(batch, index) for index in range(len(batch.reqs))])

    # The pass

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the batch asks for all that is wanted of it."""
        global _current
        own = self._widen() if self._widens else {}
        _current = self
        try:
            yield
        finally:
            _current = None
            vars(self.batch).update(own)

    def _widen(self) -> dict[str, Any]:
        """Have the batch ask for all that is wanted of it; returns what it asked before."""
        batch, parts = self.batch, self._parts
        tokens = pinned([token for part in parts for token in part.wide_tokens])
        wide: dict[str, Any] = {
            "return_logprob": True,
            "extend_logprob_start_lens": [part.wide.start - part.begin for part in parts],
            "extend_input_logprob_token_ids": tokens.clamp_(0, batch.model_config.vocab_size - 1),
            "top_logprobs_nums": [part.wide.top for part in parts],
        }
        if any(part.wide.ids for part in parts):  # SGLang expects them of all requests or of none
            wide["token_ids_logprobs"] = [list(part.wide.ids) for part in parts]
        elif not batch.return_logprob:
            wide["token_ids_logprobs"] = [None] * len(parts)
        own = {name: getattr(batch, name) for name in wide}
        vars(batch).update(wide)
        return own

    def score_following(self, states: torch.Tensor, logits_of: Callable[..., torch.Tensor]) -> None:
        """states: [rows, hidden size] of all rows of the pass. logits_of: theirs."""
        if not self._last_rows:
            return
        places = [place for place, _ in self._last_rows]
        logits = logits_of(states[to_device(places, states.device)]).float()
        pairs = [
            (row, min(token, logits.shape[1] - 1))
            for row, (_, rows) in enumerate(self._last_rows)
            for token in rows.following or ()
        ]
        row, token = to_device([*chain(*pairs)], states.device).view(-1, 2).T
        self._following = to_host(torch.log_softmax(logits, dim=-1)[row, token])

    # Its result

    def deliver(self, result: Any) -> None:
        """Take the rows from a pass's result, narrow it, and give requests the rows before it."""
        if result.copy_done is not None:
            result.copy_done.synchronize()
        elif torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # steps do not overlap
        seam.finalize(result.logits_output)
        if result.logits_output.input_token_logprobs is not None:
            self._narrow(result)
        if self._following is not None:
            values = iter(self._following.tolist())
            for _, rows in self._last_rows:
                assert rows.following is not None
                rows.following = dict(zip(rows.following, values, strict=False))
        for part in self._parts:
            if part.reads:
                _give_earlier_rows(part)

    def scored(self) -> Iterator[Req]:
        """The requests that have all logprobs of their prompts by now."""
        return (
            part.req for part in self._parts if part.req.return_logprob and _is_scored(part.req)
        )

    def _narrow(self, result: Any) -> None:
        output = result.logits_output
        values = output.input_token_logprobs.cpu()
        narrow, at = [], 0
        for index, part in enumerate(self._parts):
            own, wide = part.own, part.wide
            mine = values[at : at + part.end - wide.start]
            at += len(mine)
            if not _is_skipped(part.req):
                narrow.append(mine[own.start - wide.start :])
            if part.leaves:
                lists = RowLists(
                    mine.tolist(),
                    _of(output.input_top_logprobs_val, index),
                    _of(output.input_top_logprobs_idx, index),
                    _of(output.input_token_ids_logprobs_val, index),
                )
                for rows in part.leaves:
                    rows.fill(wide.start, lists, wide.ids)
            if wide != own:
                _narrow_lists(output, index, own, wide)
        output.input_token_logprobs = torch.cat(narrow) if narrow else values[:0]
        result.extend_logprob_start_len_per_req = [p.own.start - p.begin for p in self._parts]


_current: ScoredStep | None = None
"""The pass that is being launched, for `score_rows`."""


def score_rows(original: Callable[..., Any], processor: Any, **arguments: Any) -> Any:
    """Around what computes the rows of a pass from its hidden states."""
    if _current is None:
        return original(processor, **arguments)
    head, metadata = arguments["lm_head"], arguments["logits_metadata"]
    compute = arguments["get_logits_fn"]
    _current.score_following(
        arguments["pruned_states"],
        lambda states: compute(states, head, metadata, use_logits_buffer=False),
    )
    return seam.compute_rows(original, processor, arguments)


def _is_skipped(req: Req) -> bool:
    """Whether SGLang passes over the request in a prefill's result. It passes over its place in the
    logprobs, too, but not over the logprobs, so that those after it would get them."""
    return req.is_retracted or (req.finished() and req.inflight_middle_chunks <= 0)


def _of(lists: list[Any] | None, index: int) -> Any:
    return lists[index] if lists is not None else []


def _narrow_lists(output: Any, index: int, own: Ask, wide: Ask) -> None:
    """To the rows of one request, the tokens and the ids that it asked itself."""
    skip = own.start - wide.start
    columns = [wide.ids.index(token) for token in own.ids]
    for lists in (output.input_top_logprobs_val, output.input_top_logprobs_idx):
        if lists is not None:
            lists[index] = [row[: own.top] for row in lists[index][skip:]]
    for lists in (output.next_token_top_logprobs_val, output.next_token_top_logprobs_idx):
        if lists is not None:
            lists[index] = lists[index][: own.top]
    if output.input_token_ids_logprobs_val is not None:
        rows = output.input_token_ids_logprobs_val[index][skip:]
        output.input_token_ids_logprobs_val[index] = [[row[c] for c in columns] for row in rows]
        output.input_token_ids_logprobs_idx[index] = [list(own.ids) for _ in rows]
    asked = output.next_token_token_ids_logprobs_val
    if asked is not None and isinstance(asked[index], torch.Tensor):
        asked[index] = asked[index][columns]
        output.next_token_token_ids_logprobs_idx[index] = list(own.ids)


def _give_earlier_rows(part: _Part) -> None:
    """Where SGLang collects the rows of a request, begin with those that others have left."""
    req = part.req
    start = req.logprob_start_len
    if req.is_retracted or req.finished() or _is_scored(req) or part.begin <= start:
        return
    if req.input_token_logprobs is not None:  # a later part of the prompt
        return
    ask = Ask(start, part.own.top, part.own.ids)
    parts = [rows.read(start, part.begin, req.origin_input_ids, ask) for rows in part.reads]
    values = [value for one in parts for value in one.values]
    if len(values) != part.begin - start or any(value != value for value in values):
        message = "logprobs of shared tokens are missing; send the request again"
        logger.error("batchllm: request %s: %s", req.rid, message)
        req.to_finish = FINISH_ABORT(message, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalError")
    req.input_token_logprobs = values  # type: ignore[assignment]
    if ask.top:
        req.temp_input_top_logprobs_val = [one.top_values for one in parts]  # type: ignore
        req.temp_input_top_logprobs_idx = [one.top_ids for one in parts]  # type: ignore
    if req.logprob.token_ids_logprob is not None:
        req.temp_input_token_ids_logprobs_val = [one.id_values for one in parts]  # type: ignore
        req.temp_input_token_ids_logprobs_idx = [  # type: ignore
            [list(ask.ids)] * len(one.values) for one in parts
        ]
