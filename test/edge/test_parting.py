"""Which prompts of a long list go first."""

import pytest

from sglang_batchllm.edge import parting
from sglang_batchllm.edge.parting import opening_of


@pytest.fixture(autouse=True)
def small_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parting, "OPENING_TOKENS", 1000)


def prompt(document: int, own: int) -> list[int]:
    """A system prompt of 100 tokens, a document of 400, and 50 of its own."""
    return [*range(100), *[document] * 400, *[own] * 50]


def test_those_that_share_most_with_the_first_go_first():
    prompts = [prompt(own % 4, own) for own in range(200)]
    # At depth 256 a prompt has 294 tokens more.
    assert opening_of(prompts) == [0, 4, 8, 12]


def test_where_few_share_the_document_those_that_share_the_system_prompt_do():
    prompts = [prompt(own, own) for own in range(200)]
    assert opening_of(prompts) == [0, 1, 2]  # at depth 64 each has 486 tokens more


def test_what_shares_nothing_goes_in_order():
    prompts = [[own] * 300 for own in range(100)]
    assert opening_of(prompts) == [0, 1, 2, 3]


def test_texts_are_measured_in_characters():
    texts = [f"{own}" * 1000 for own in range(10, 90)]
    assert opening_of(texts) == [0, 1]


def test_a_list_that_takes_no_longer_has_no_opening():
    assert opening_of([[own] * 300 for own in range(7)]) == []
    assert opening_of([[1, 2, 3]] * 50) == []
