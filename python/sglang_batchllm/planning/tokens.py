"""The prompts of a batch, in the forms callers have them, and as keys that sort by prefix."""

import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np

_INT32 = np.iinfo(np.int32)
_INT64 = np.iinfo(np.int64)


@dataclass(frozen=True, eq=False)
class TokenTable:
    """All prompts of a batch in one flat array.

    tokens: integers, 1-D, prompt after prompt.
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


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """Prompts as byte strings of fixed-width tokens.

    Byte strings of one width compare at memcmp speed, and although their order is not the
    numeric order of the tokens, prompts with a common prefix are neighbours in it and a prompt
    comes before its extensions, which is all that building a prefix tree needs.

    keys: one `bytes` per prompt. dtype: int32, or int64 when any token id needs it.
    lens: int64[n], tokens per prompt.
    """

    keys: list[bytes]
    dtype: type[np.int32] | type[np.int64]
    lens: np.ndarray

    def tokens(self, prompt: int) -> np.ndarray:
        """The prompt's tokens, `dtype`[lens[prompt]], without a copy."""
        return np.frombuffer(self.keys[prompt], self.dtype)


def encode_prompts(prompts: Prompts) -> EncodedPrompts:
    """Encode prompts one at a time, so that at most one extra copy of the batch exists.

    Raises ValueError, naming the prompt, for one that is empty, not 1-D, or not made of
    integers that fit in a signed 64-bit integer.
    """
    rows = _split(prompts)
    keys: list[bytes] = []
    dtype: type[np.int32] | type[np.int64] = np.int32
    for index, row in enumerate(rows):
        tokens = _as_integers(row, index)
        if dtype is np.int32 and not _fits_int32(tokens):
            dtype = np.int64
            # In place, so that the narrow keys are freed as the wide ones appear.
            for done, key in enumerate(keys):
                keys[done] = np.frombuffer(key, np.int32).astype(np.int64).tobytes()
        keys.append(tokens.astype(dtype, copy=False).tobytes())
    lens = np.fromiter(map(len, keys), np.int64, len(keys)) // np.dtype(dtype).itemsize
    return EncodedPrompts(keys, dtype, lens)


def _split(prompts: Prompts) -> Sequence[Prompt] | np.ndarray:
    if isinstance(prompts, TokenTable):
        bounds = prompts.offsets.tolist()
        return [prompts.tokens[a:b] for a, b in pairwise(bounds)]
    if isinstance(prompts, np.ndarray) and prompts.ndim != 2:
        raise ValueError(
            f"prompts is an array of {prompts.ndim} dimensions; "
            "pass a 2-D array (one prompt per row), a list of prompts, or a TokenTable"
        )
    return prompts


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
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"prompt {index} has dtype {tokens.dtype}; token ids must be integers")
    if tokens.dtype == np.uint64 and tokens.max() > _INT64.max:
        raise ValueError(
            f"prompt {index} has a token id of 2**63 or more; token ids must fit in int64"
        )
    return tokens


def _fits_int32(tokens: np.ndarray) -> bool:
    return np.can_cast(tokens.dtype, np.int32) or bool(
        # The ufuncs themselves: on short prompts the array methods' overhead would show.
        np.minimum.reduce(tokens) >= _INT32.min and np.maximum.reduce(tokens) <= _INT32.max
    )
