"""Batches of token ids with every kind of sharing, and what they cost at least."""

import random
from collections.abc import Sequence

from engines import VOCAB_SIZE


def mixed_batch(count: int = 200, seed: int = 0) -> list[list[int]]:
    """Two-level prefixes, singletons, duplicates and prompts that are prefixes of others."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randint(low, high))]

    prompts: list[list[int]] = []
    while len(prompts) < count:
        top = tokens(24, 60)
        for _ in range(3):
            middle = top + tokens(8, 30)
            prompts += [middle + tokens(1, 20) for _ in range(4)]
            prompts.append(middle)  # a prefix of others
            prompts += [[*middle, 7]] * 2  # duplicates
        prompts.append(top)
        prompts += [tokens(5, 50) for _ in range(3)]  # singletons
    prompts = prompts[:count]
    rng.shuffle(prompts)
    return prompts


def distinct_tokens(prompts: Sequence[Sequence[int]], page_size: int = 1) -> int:
    """Prompt tokens that must be computed at least: those that no shorter or equal prompt before
    has left in whole pages of a cache, and always the last one."""
    cached: set[tuple[int, ...]] = set()
    total = 0
    for prompt in sorted(map(tuple, prompts), key=lambda p: (len(p), p)):
        pages = [prompt[:end] for end in range(page_size, len(prompt) + 1, page_size)]
        hits = sum(page in cached for page in pages)
        total += len(prompt) - min(hits * page_size, (len(prompt) - 1) // page_size * page_size)
        cached.update(pages)
    return total
