"""The batches of the offline benchmarks: seeded random token ids with a given sharing structure."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


class Batch(Protocol):
    """name; requests: how many; output: mean tokens to decode; distinct_tokens: prompt tokens to
    compute when none is computed twice; kv_tokens: the KV pool, None for all the memory. limit:
    None where each request is told how long its output will be; else what all may decode, and each
    ends by itself before."""

    @property
    def name(self) -> str: ...

    @property
    def requests(self) -> int: ...

    @property
    def output(self) -> int: ...

    @property
    def distinct_tokens(self) -> int: ...

    @property
    def kv_tokens(self) -> int | None: ...

    @property
    def limit(self) -> int | None: ...

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        """Token ids, shuffled."""
        ...

    def outputs(self) -> list[int]:
        """Output tokens of each request, in the order of `prompts`."""
        ...


ORDERS = ("shuffled", "grouped")
"""In which stock SGLang gets a case, whose figure is that of the better."""


@dataclass(frozen=True)
class Case:
    """requests in groups of `sharing_degree` that share `prefix` tokens, each with `suffix` of
    its own and `output` tokens to decode; kv_tokens: the KV pool, None for all the memory.
    longest_output: if set, outputs are geometric with mean `output`, cut at this length. twin: the
    case whose very prompts and lengths these are, but here nobody knows the lengths before. system:
    tokens that come before all, shared by all."""

    name: str
    requests: int
    sharing_degree: int
    prefix: int
    suffix: int
    output: int
    kv_tokens: int | None = None
    longest_output: int | None = None
    twin: str | None = None
    system: int = 0

    @property
    def limit(self) -> int | None:
        return self.longest_output if self.twin else None

    @property
    def distinct_tokens(self) -> int:
        groups = self.requests // self.sharing_degree
        return self.system + groups * self.prefix + self.requests * self.suffix

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        rng = random.Random(f"{self.twin or self.name}-{seed}")
        prompts = []
        system = rng.choices(range(vocab_size), k=self.system)
        for _ in range(self.requests // self.sharing_degree):
            prefix = system + rng.choices(range(vocab_size), k=self.prefix)
            for _ in range(self.sharing_degree):
                prompts.append(prefix + rng.choices(range(vocab_size), k=self.suffix))
        rng.shuffle(prompts)
        return prompts

    def outputs(self) -> list[int]:
        if self.longest_output is None:
            return [self.output] * self.requests
        rng = random.Random(f"{self.twin or self.name}-outputs")
        lengths = (math.ceil(rng.expovariate(1 / self.output)) for _ in range(self.requests))
        return [min(max(length, 1), self.longest_output) for length in lengths]


WORDS = 10_000
"""Token ids of `Sentences`; a model's vocabulary has to be as large."""


@dataclass(frozen=True)
class Sentences(Case):
    """As `Case`, but suffixes begin alike wherever those of a language would: their tokens are
    drawn by Zipf's law."""

    @property
    def distinct_tokens(self) -> int:
        prompts = np.array(sorted(self.prompts(WORDS)))
        differ = prompts[1:] != prompts[:-1]
        return prompts.size - int(differ.argmax(axis=1).sum())

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        rng = np.random.default_rng([seed, *self.name.encode()])
        chances = 1 / np.arange(1, WORDS + 1)
        words = rng.choice(WORDS, (self.requests, self.suffix), p=chances / chances.sum())
        prefixes = rng.integers(WORDS, size=(self.requests // self.sharing_degree, self.prefix))
        prompts = np.hstack([np.repeat(prefixes, self.sharing_degree, axis=0), words])
        return rng.permutation(prompts).tolist()


CASES = {
    case.name: case
    for case in (
        Case("M1", 800, 16, 2000, 200, 100),
        Case("M2", 800, 16, 2000, 200, 400),
        Case("M3", 640, 32, 8000, 200, 200),
        Case("M4", 400, 1, 0, 1000, 200),
        Case("M5", 800, 4, 2000, 200, 100, kv_tokens=120_000),
        Case("M6", 800, 16, 2000, 200, 100, kv_tokens=120_000),
        Case("M2-twice", 1600, 16, 2000, 200, 400),
        Case("M3-twice", 1280, 32, 8000, 200, 200),
        Case("few", 384, 16, 2000, 150, 120),
        Case("tree", 640, 16, 1000, 120, 150, system=3000),
        Case("classify", 4000, 500, 1500, 40, 4),
        Case("classify-1", 4000, 500, 1500, 40, 1),
        Case("label", 20_000, 100, 50, 10, 1),
        Case("one-prefix", 2000, 2000, 369, 100, 8),  # prompts, prefix: vllm#36010
        Sentences("sentences", 2000, 2000, 369, 100, 8),
        Case("mixed", 800, 16, 2000, 200, 200, longest_output=1000),
        Case("mixed-unknown", 800, 16, 2000, 200, 200, longest_output=1000, twin="mixed"),
    )
}


TRACE_REQUESTS = 130
"""So many of the conversation trace run in about a minute on one H200, on either side."""

BLOCK = 512
"""Tokens that one hash id of a trace stands for."""


@dataclass(frozen=True)
class TraceSample:
    """Requests of a Mooncake trace, which has no text: every block of its prompts is replaced by
    random tokens seeded by the block's hash id, so what is shared is as in the trace.

    lines: (prompt tokens, output tokens, hash ids of the prompt's blocks) of each request.
    """

    name: str
    lines: tuple[tuple[int, int, tuple[int, ...]], ...]
    kv_tokens: int | None = None
    limit: int | None = None

    @staticmethod
    def of(
        path: Path, requests: int = TRACE_REQUESTS, seed: int = 0, context: int = 131_072
    ) -> TraceSample:
        """At least `requests` requests of `path`: whole conversations, drawn at random, but for
        requests that together with their output are longer than `context` tokens.

        Requests belong to one conversation when their first three blocks are equal (the first is
        the same in all the trace). Single requests drawn at random would share little.
        """
        conversations: dict[tuple[int, ...], list[tuple[int, int, tuple[int, ...]]]] = {}
        for text in path.read_text().splitlines():
            line = json.loads(text)
            if line["input_length"] + line["output_length"] > context:
                continue
            blocks = tuple(line["hash_ids"])
            conversations.setdefault(blocks[:3], []).append(
                (line["input_length"], line["output_length"], blocks)
            )
        rng = random.Random(seed)
        drawn = list(conversations.values())
        rng.shuffle(drawn)
        lines: list[tuple[int, int, tuple[int, ...]]] = []
        for conversation in drawn:
            if len(lines) >= requests:
                break
            lines += conversation
        rng.shuffle(lines)
        return TraceSample("trace", tuple(lines))

    @property
    def requests(self) -> int:
        return len(self.lines)

    @property
    def output(self) -> int:
        return sum(self.outputs()) // self.requests

    @property
    def distinct_tokens(self) -> int:
        longest: dict[int, int] = {}
        for length, _, blocks in self.lines:
            for at, block in enumerate(blocks):
                longest[block] = max(longest.get(block, 0), min(length - at * BLOCK, BLOCK))
        same = Counter((length, blocks) for length, _, blocks in self.lines)
        repeats = sum(count - 1 for count in same.values())  # each computes its last token
        return sum(longest.values()) + repeats

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        return [
            np.concatenate(
                [
                    np.random.default_rng([seed, block]).integers(vocab_size, size=BLOCK)
                    for block in blocks
                ]
            )[:length].tolist()
            for length, _, blocks in self.lines
        ]

    def outputs(self) -> list[int]:
        return [output for _, output, _ in self.lines]
