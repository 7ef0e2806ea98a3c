"""Lists of prompts reach the scheduler as one message, so that it can plan them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager


def send_as_one_batch(
    stock_rule: Callable[..., bool],
    manager: TokenizerManager,
    batch_size: int,
    requests: GenerateReqInput | EmbeddingReqInput,
) -> bool:
    """Wraps TokenizerManager._should_use_batch_tokenization, which decides one message or many.

    SGLang already sends lists of token ids whole; with ``batchllm`` lists of plain text are too.
    Anything with images or embeddings is sent as SGLang does and gathered by the scheduler.
    """
    if stock_rule(manager, batch_size, requests):
        return True
    return (
        getattr(manager.server_args, "batchllm", False)
        and batch_size > 0
        and isinstance(requests.text, list)
        and manager.is_generation
        and not requests.contains_mm_input()
    )
