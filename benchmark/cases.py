"""The batches of the offline benchmark: seeded random token ids with a given sharing structure."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """requests in groups of `sharing_degree` that share `prefix` tokens, each with `suffix` of
    its own and `output` tokens to decode; kv_tokens: the KV pool, None for all the memory.
    longest_output: if set, outputs are geometric with mean `output`, cut at this length."""

    name: str
    requests: int
    sharing_degree: int
    prefix: int
    suffix: int
    output: int
    kv_tokens: int | None = None
    longest_output: int | None = None

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        """Token ids, shuffled."""
        rng = random.Random(f"{self.name}-{seed}")
        prompts = []
        for _ in range(self.requests // self.sharing_degree):
            prefix = rng.choices(range(vocab_size), k=self.prefix)
            for _ in range(self.sharing_degree):
                prompts.append(prefix + rng.choices(range(vocab_size), k=self.suffix))
        rng.shuffle(prompts)
        return prompts

    def outputs(self) -> list[int]:
        """Output tokens of each request, in the order of `prompts`."""
        if self.longest_output is None:
            return [self.output] * self.requests
        rng = random.Random(f"{self.name}-outputs")
        lengths = (math.ceil(rng.expovariate(1 / self.output)) for _ in range(self.requests))
        return [min(max(length, 1), self.longest_output) for length in lengths]


CASES = {
    case.name: case
    for case in (
        Case("M1", 800, 16, 2000, 200, 100),
        Case("M2", 800, 16, 2000, 200, 400),
        Case("M3", 640, 32, 8000, 200, 200),
        Case("M4", 400, 1, 0, 1000, 200),
        Case("M5", 800, 4, 2000, 200, 100, kv_tokens=120_000),
        Case("M6", 800, 16, 2000, 200, 100, kv_tokens=120_000),
        Case("mixed", 800, 16, 2000, 200, 200, longest_output=1000),
    )
}
