"""Batches of the benchmarks share what they say."""

import json

import pytest

from batches import BLOCK, CASES, TraceSample
from sglang_batchllm.planning import plan_batch

VOCAB_SIZE = 32_000


@pytest.fixture
def trace(tmp_path):
    """40 conversations of 1 to 4 requests, each longer than the one before by two blocks; block 0
    is common to all, and every third conversation repeats its last request."""
    lines, fresh = [], 1
    for number in range(40):
        blocks = [0]
        for turn in range(1 + number % 4):
            blocks += range(fresh, fresh + 2)
            fresh += 2
            length = BLOCK * len(blocks) - 100
            lines.append({"input_length": length, "output_length": turn + 1, "hash_ids": blocks[:]})
        if number % 3 == 0:
            lines.append(lines[-1])
        blocks.pop()
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_sample_shares_what_its_hash_ids_share(trace):
    sample = TraceSample.of(trace, 30)
    assert 30 <= sample.requests < 36
    prompts = sample.prompts(VOCAB_SIZE)
    assert [len(prompt) for prompt in prompts] == [length for length, _, _ in sample.lines]
    assert sample.distinct_tokens == plan_batch(prompts).report.distinct_tokens
    assert sample.distinct_tokens < sum(map(len, prompts))


def test_a_sample_is_seeded_and_fits_the_context(trace):
    assert TraceSample.of(trace, 10, seed=3) == TraceSample.of(trace, 10, seed=3)
    assert TraceSample.of(trace, 10, seed=3) != TraceSample.of(trace, 10, seed=4)
    short = TraceSample.of(trace, 100, context=3 * BLOCK)
    assert max(length + output for length, output, _ in short.lines) <= 3 * BLOCK


def test_sentences_begin_alike_in_many_places():
    sentences = CASES["sentences"]
    plan = plan_batch(sentences.prompts(VOCAB_SIZE))
    assert sentences.distinct_tokens == plan.report.distinct_tokens
    branches = (plan.tree.num_requests > 1).sum()
    assert 200 < branches < 1000
    loose = sentences.prefix + sentences.requests * sentences.suffix
    assert 0.9 * loose < sentences.distinct_tokens < loose
