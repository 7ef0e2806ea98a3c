"""Answers with logprobs of prompts: what requests share is made once for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_batchllm.edge import seams
from sglang_batchllm.edge.garbage import Garbage
from sglang_batchllm.server.handover import SLICE

if TYPE_CHECKING:
    from sglang_batchllm.edge.seams.v0_5_17 import front as seam
else:
    seam = seams.load("front")


class SharedAnswers(seam.SendingManager):
    """SGLang's front end, to which rows that requests share (`policy.rows`) come as the same lists,
    as far as they are in one message. They stay that in the answers."""

    def init_running_status(self) -> None:
        super().init_running_status()
        self.garbage = Garbage()
        self._rows: dict[int, tuple[Any, Any]] | None = None
        """Of one message, by the identity of a list: the list, so that it lives, and its answer."""

    async def _handle_batch_output(self, recv_obj: Any) -> None:
        if not any(getattr(recv_obj, "input_token_logprobs_val", None) or ()):
            await super()._handle_batch_output(recv_obj)
            return
        self._rows = {}
        try:
            with self.garbage.made_for_long():
                await super()._handle_batch_output(recv_obj)
        finally:
            self._rows = None
            if len(self.rid_to_state) < SLICE:
                self.garbage.sweep_if_due()

    def detokenize_top_logprobs_tokens(
        self, token_logprobs_val: list[Any], token_logprobs_idx: list[Any], decode_to_text: bool
    ) -> list[Any]:
        if self._rows is None or len(token_logprobs_val) < 2:
            return super().detokenize_top_logprobs_tokens(
                token_logprobs_val, token_logprobs_idx, decode_to_text
            )
        rows = self._rows
        new = {
            id(values): (values, ids)
            for values, ids in zip(token_logprobs_val, token_logprobs_idx, strict=True)
            if id(values) not in rows
        }
        if new:
            values, ids = map(list, zip(*new.values(), strict=True))
            made = super().detokenize_top_logprobs_tokens(values, ids, decode_to_text)
            rows.update(zip(new, zip(values, made, strict=True), strict=True))
        return [rows[id(values)][1] for values in token_logprobs_val]
