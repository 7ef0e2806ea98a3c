"""Prompts with text: what they share, and that they are rows of batch files."""

from collections import Counter

import pytest

import texts
from batches import CASES, Case
from sglang_batchllm.jobs.rows import Rules
from texts import batch_lines, chat_bodies, make_prompts, shrunk
from tiny_model import train_tokenizer

SOURCE = "".join(f"def function_{number}(x):\n    return x + {number}\n\n" for number in range(999))


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "python_sources", lambda: iter([SOURCE]))
    train_tokenizer(tmp_path, [SOURCE], 512)
    return tmp_path


def test_prompts_share_documents_of_the_wanted_length(tokenizer):
    from transformers import AutoTokenizer

    prompts = make_prompts(Case("small", 12, 4, 50, 10, 5), tokenizer, seed=0)
    assert sorted(Counter(document for document, _ in prompts).values()) == [4, 4, 4]
    encode = AutoTokenizer.from_pretrained(tokenizer)
    for document, question in prompts:
        assert len(encode(document)["input_ids"]) == pytest.approx(50, abs=3)
        assert len(encode(question)["input_ids"]) == pytest.approx(10, abs=3)
    assert prompts != make_prompts(Case("small", 12, 4, 50, 10, 5), tokenizer, seed=1)


def test_bodies_are_rows_of_a_batch_file(tokenizer):
    bodies = chat_bodies([("a\u2028document", "a question"), ("another", "b")], 7)
    lines = "".join(batch_lines(bodies)).encode().splitlines()
    rows = [Rules().read(line) for line in lines]
    assert [row.body for row in rows] == bodies
    assert [row.custom_id for row in rows] == ["0", "1"]


def test_a_shrunk_case_is_as_short_of_memory():
    whole, tiny = CASES["M5"], shrunk(CASES["M5"])
    assert whole.kv_tokens and tiny.kv_tokens and tiny.name != whole.name
    assert tiny.distinct_tokens / tiny.kv_tokens == whole.distinct_tokens / whole.kv_tokens
    assert shrunk(CASES["M3"]).requests % CASES["M3"].sharing_degree == 0
    assert shrunk(CASES["M1"]).kv_tokens is None
