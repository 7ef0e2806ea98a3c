"""Batches of token ids with every kind of sharing, and what they cost at least."""

import random
from collections import Counter
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


def computed_tokens(prompts: Sequence[Sequence[int]], least_saved: int) -> int:
    """The same where a prefix is computed once only if that saves so many tokens, beside those that
    the longest such prefix of it saves. One that is a whole prompt is computed by that."""
    together = Counter(tuple(p[:end]) for p in prompts for end in range(1, len(p) + 1))
    onwards = Counter[tuple[int, ...]]()  # the most that go on alike
    for prefix, count in together.items():
        onwards[prefix[:-1]] = max(onwards[prefix[:-1]], count)
    shared: dict[tuple[int, ...], int] = {}  # tokens of it that are computed once

    def above(prefix: tuple[int, ...]) -> int:
        ends = range(len(prefix) - 1, 0, -1)
        return next((shared[prefix[:end]] for end in ends if prefix[:end] in shared), 0)

    total = 0
    for prefix in sorted(together, key=len):
        if together[prefix] > max(onwards[prefix], 1):
            begin = above(prefix)
            end = max(len(prefix) - (onwards[prefix] == 0), begin)
            if (together[prefix] - 1) * (end - begin) >= max(least_saved, 1):
                shared[prefix] = end
                total += end - begin
    leading = {tuple(p) for p in prompts if shared.get(tuple(p)) == len(p)}
    own = (len(p) - shared.get(tuple(p), above(tuple(p))) for p in prompts)
    return total + sum(max(tokens, 1) for tokens in own) - len(leading)
