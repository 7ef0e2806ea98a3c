"""Reading the next tokens of many prompts of a table at once."""

from collections.abc import Iterator

import numpy as np

from sglang_batchllm.planning.tokens import TokenTable

_BLOCK = 1 << 18
"""Tokens that are handled together: few enough for the processor's cache."""


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices that cover `rows` rows of `width` tokens, each as many rows as make a block."""
    step = max(1, _BLOCK // width)
    return (slice(start, start + step) for start in range(0, rows, step))


class Windows:
    """The tokens of a table from `as_table`, by window: some tokens from a place on.

    dtype: of the windows, int32 or, if the table's dtype does not fit in that, int64.
    """

    def __init__(self, table: TokenTable):
        self._tokens = table.tokens
        narrow = np.can_cast(table.tokens.dtype, np.int32)
        self.dtype = np.dtype(np.int32 if narrow else np.int64)

    def read(self, starts: np.ndarray, remaining: np.ndarray, width: int) -> np.ndarray:
        """`dtype`[m, width], the tokens from each of `starts` on, and zeros where one has fewer.

        starts: int64[m], places in the table. remaining: int64[m], tokens that count from there on.
        width: tokens, at least 1 and at most those of the table.
        """
        tokens = self._tokens
        bytes_each = tokens.dtype.itemsize
        last = tokens.size - width
        # Overlapping windows as single values, which numpy copies a whole at a time.
        every = np.ndarray((last + 1,), f"V{width * bytes_each}", tokens, strides=(bytes_each,))
        late = np.flatnonzero(starts > last)
        found = every[np.minimum(starts, last) if late.size else starts]
        found = found.view(tokens.dtype).reshape(-1, width).astype(self.dtype, copy=False)
        for row in late.tolist():  # fewer than `width`, since no two prompts end at one place
            start = int(starts[row])
            found[row, : remaining[row]] = tokens[start : start + int(remaining[row])]
        if len(remaining) and remaining.min() < width:
            found[np.arange(width) >= remaining[:, None]] = 0
        return found

    def common_to_all(self, starts: np.ndarray, remaining: np.ndarray) -> int:
        """Tokens that all m windows from `starts` on have in common, or a block's if more.

        One pass in order of `starts`; what no window before had in common is not read.
        """
        common = min(int(remaining.min()), _BLOCK)
        row = 0
        while common and row < len(starts):
            step = max(1, _BLOCK // common)
            part = slice(row, row + step)
            found = self.read(starts[part], remaining[part], common)
            differs = (found != self.read(starts[:1], remaining[:1], common)).any(axis=0)
            if differs.any():
                common = int(differs.argmax())
            row += step
        return common
