"""Whole pages: the unit in which a KV cache shares a prefix."""

from typing import TypeVar

import numpy as np

Tokens = TypeVar("Tokens", int, np.ndarray)


def floor_to_page(tokens: Tokens, page_size: int) -> Tokens:
    """Round a token count, or an array of them, down to whole pages of `page_size` tokens."""
    return tokens - tokens % page_size
