"""The prompts of a batch, in the forms callers have them, and as one table."""

import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn, TypeAlias

import numpy as np

_INT32 = np.iinfo(np.int32)
_INT64 = np.iinfo(np.int64)
_BLOCK = 1 << 20
"""Tokens that are looked at together where a whole table must be."""
_ROWS = 256
"""Prompts that are looked at together: a look at each takes longer than all else about it."""


@dataclass(frozen=True, eq=False)
class TokenTable:
    """All prompts of a batch in one flat array.

    tokens: integers, 1-D, prompt after prompt; a `np.memmap` where they are more than memory holds.
    offsets: int64[n + 1], prompt i is tokens[offsets[i]:offsets[i + 1]].

    Raises ValueError when the two do not fit each other.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1:
            raise ValueError(
                f"TokenTable.tokens has {self.tokens.ndim} dimensions; flatten it to one"
            )
        if self.offsets.ndim != 1 or self.offsets.dtype.kind not in "iu" or not self.offsets.size:
            raise ValueError(
                "TokenTable.offsets must be a 1-D integer array with one entry more than prompts"
            )
        if self.offsets[0] != 0 or self.offsets[-1] != self.tokens.size:
            raise ValueError(
                f"TokenTable.offsets runs from {self.offsets[0]} to {self.offsets[-1]}; "
                f"it must run from 0 to the number of tokens, {self.tokens.size}"
            )
        falls = np.flatnonzero(self.offsets[1:] < self.offsets[:-1])
        if falls.size:
            raise ValueError(
                f"TokenTable.offsets falls at prompt {falls[0]}; offsets must not decrease"
            )


Prompt: TypeAlias = Sequence[int] | np.ndarray | array.array
Prompts: TypeAlias = Sequence[Prompt] | Sequence[np.ndarray] | np.ndarray | TokenTable


def as_table(prompts: Prompts) -> TokenTable:
    """All forms of prompts as a table with int64 offsets and contiguous integer tokens.

    A table or a 2-D array that is so already stays where it is, in memory or on disk. Other
    prompts are copied one at a time, to int32, or to int64 when any token id needs it.

    Raises ValueError, naming the prompt, for one that is empty, not 1-D, or not made of
    integers that fit in a signed 64-bit integer.
    """
    if isinstance(prompts, TokenTable):
        return _check(prompts.tokens, prompts.offsets.astype(np.int64, copy=False))
    if not isinstance(prompts, np.ndarray):
        return _join(prompts)
    if prompts.ndim != 2:
        raise ValueError(
            f"prompts is an array of {prompts.ndim} dimensions; "
            "pass a 2-D array (one prompt per row), a list of prompts, or a TokenTable"
        )
    count, length = prompts.shape
    return _check(prompts.reshape(-1), np.arange(count + 1) * length)


def _check(tokens: np.ndarray, offsets: np.ndarray) -> TokenTable:
    empty = np.flatnonzero(offsets[1:] == offsets[:-1])
    if empty.size:
        raise ValueError(f"prompt {empty[0]} is empty; every prompt needs at least one token")
    # As a plain array: slices of a memmap would each cost its bookkeeping.
    tokens = np.ascontiguousarray(tokens)
    if tokens.size:
        _check_dtype(tokens, 0)
    if tokens.dtype == np.uint64:
        for start in range(0, tokens.size, _BLOCK):
            beyond = np.flatnonzero(tokens[start : start + _BLOCK] > _INT64.max)
            if beyond.size:
                _raise_beyond_int64(int(np.searchsorted(offsets, start + beyond[0], "right")) - 1)
    return TokenTable(tokens, offsets)


def _join(rows: Sequence[Prompt]) -> TokenTable:
    joined = bytearray()
    dtype: type[np.int32] | type[np.int64] = np.int32
    offsets = np.zeros(len(rows) + 1, np.int64)
    left = iter(rows)
    for start in range(0, len(rows), _ROWS):
        block = [*islice(left, _ROWS)]
        tokens = _joined_block(block, start)
        if dtype is np.int32 and not _fits_int32(tokens):
            dtype = np.int64
            joined = bytearray(np.frombuffer(joined, np.int32).astype(np.int64))
        joined += tokens.astype(dtype, "C", copy=False).data
        offsets[start + 1 : start + 1 + len(block)] = [*map(len, block)]
    return TokenTable(np.frombuffer(joined, dtype), np.cumsum(offsets))


def _joined_block(rows: Sequence[Prompt], first: int) -> np.ndarray:
    """The tokens of these prompts, of which the first has that index."""
    if all(type(row) is array.array and row.typecode == "q" and row for row in rows):
        return np.frombuffer(b"".join(rows), np.int64)  # type: ignore[arg-type]
    return np.concatenate(
        [_as_integers(row, first + i).astype(np.int64, copy=False) for i, row in enumerate(rows)]
    )


def _as_integers(row: Prompt, index: int) -> np.ndarray:
    """One prompt as a non-empty 1-D integer array whose values fit in int64."""
    try:
        # array.array reads a list of ints faster than numpy, and refuses floats.
        tokens = np.asarray(array.array("q", row) if isinstance(row, list | tuple) else row)
    except OverflowError:
        raise ValueError(
            f"prompt {index} has a token id beyond 64 bits; token ids must fit in int64"
        ) from None
    except TypeError:
        raise ValueError(
            f"prompt {index} holds something other than integers; pass a flat list of token ids"
        ) from None
    if tokens.ndim != 1:
        raise ValueError(f"prompt {index} has {tokens.ndim} dimensions; pass a flat list of tokens")
    if not tokens.size:
        raise ValueError(f"prompt {index} is empty; every prompt needs at least one token")
    _check_dtype(tokens, index)
    if tokens.dtype == np.uint64 and tokens.max() > _INT64.max:
        _raise_beyond_int64(index)
    return tokens


def _check_dtype(tokens: np.ndarray, index: int) -> None:
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"prompt {index} has dtype {tokens.dtype}; token ids must be integers")


def _raise_beyond_int64(index: int) -> NoReturn:
    raise ValueError(f"prompt {index} has a token id of 2**63 or more; token ids must fit in int64")


def _fits_int32(tokens: np.ndarray) -> bool:
    return bool(tokens.min() >= _INT32.min and tokens.max() <= _INT32.max)
