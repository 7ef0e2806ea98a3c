"""`plan_batch` at its edges: forms of input, errors, namespaces, the report."""

import array
import json
from typing import Any

import numpy as np
import pytest

from sglang_batchllm.planning import TokenTable, plan_batch
from sglang_batchllm.planning.tokens import as_table

PROMPTS = [[1, 2, 3, 4], [1, 2, 3, 5], [9, 9, 9, 9], [1, 2, 7, 7]]


@pytest.mark.parametrize(
    "form",
    [
        np.array(PROMPTS),
        np.array(PROMPTS, np.uint16),
        np.array(PROMPTS, np.uint64),
        np.asfortranarray(PROMPTS),
        np.array(PROMPTS, ">i4"),
        [tuple(prompt) for prompt in PROMPTS],
        [array.array("i", prompt) for prompt in PROMPTS],
        [array.array("q", prompt) for prompt in PROMPTS],
        [array.array("q", PROMPTS[0]), np.array(PROMPTS[1], np.int16), *PROMPTS[2:]],
        TokenTable(np.ravel(PROMPTS), np.arange(0, 17, 4)),
    ],
)
def test_every_form_of_input_gives_the_same_plan(form: Any) -> None:
    plan, expected = plan_batch(form), plan_batch(PROMPTS)
    assert plan.order.tolist() == expected.order.tolist()
    assert plan.to_compute.tolist() == expected.to_compute.tolist()
    assert plan.group_of.tolist() == expected.group_of.tolist()
    assert plan.prompt_lens.tolist() == [4] * 4


@pytest.mark.parametrize("form", [list, lambda prompt: array.array("q", prompt)])
@pytest.mark.parametrize("last", [1, 2**40, -(2**63)])
def test_many_prompts_keep_their_tokens(form: Any, last: int) -> None:
    """They are joined some hundreds at a time, and the ids of the last ones may take more bytes."""
    prompts = [[number] * (1 + number % 3) for number in range(700)] + [[699, last]]
    table = as_table([form(prompt) for prompt in prompts])
    assert table.tokens.tolist() == [token for prompt in prompts for token in prompt]
    assert np.diff(table.offsets).tolist() == [*map(len, prompts)]
    assert table.tokens.dtype == (np.int32 if last == 1 else np.int64)


@pytest.mark.parametrize("wrong", [[], array.array("q"), np.array([2**63], np.uint64), ["a"]])
def test_one_of_many_prompts_is_named(wrong: Any) -> None:
    prompts: list[Any] = [array.array("q", [number]) for number in range(700)]
    prompts[650] = wrong
    with pytest.raises(ValueError, match="prompt 650 "):
        as_table(prompts)


def test_token_table_of_uneven_prompts() -> None:
    plan = plan_batch(TokenTable(np.array([5, 5, 6, 5, 5, 7, 7]), np.array([0, 3, 7])))
    assert plan.prompt_lens.tolist() == [3, 4]
    assert plan.shared_len.tolist() == [2, 2]


@pytest.mark.parametrize(
    "empty", [[], np.empty((0, 5), np.int64), TokenTable(np.empty(0, np.int64), np.array([0]))]
)
def test_empty_batch(empty: Any) -> None:
    plan = plan_batch(empty, expected_output_lens=[], namespaces=[])
    assert plan.order.size == plan.group_of.size == plan.groups.node.size == 0
    assert plan.tree.num_nodes == 1
    assert plan.report.saving_ratio == plan.report.sharing_degree == 1.0
    assert "0 requests" in str(plan.report)
    json.dumps(plan.report.to_dict())


def test_one_prompt() -> None:
    plan = plan_batch([[4, 4, 4]], page_size=2)
    assert plan.order.tolist() == [0]
    assert plan.group_of.tolist() == [-1]
    assert plan.shared_len.tolist() == [0]
    assert plan.to_compute.tolist() == [3]


@pytest.mark.parametrize(
    ("left", "right", "shared"),
    [
        ([2**41, -(2**50), 1], [2**41, -(2**50), 2], 2),
        ([2**32 + 7, 1], [7, 1], 0),  # equal in the low 32 bits
        ([7 - 2**32, 1], [7, 1], 0),
        ([-1, 1], [2**32 - 1, 1], 0),
        ([2**63 - 1, -(2**63), 5], [2**63 - 1, -(2**63), 6], 2),
        ([-1, -2, 3], [-1, -2, 4], 2),
    ],
)
def test_token_ids_are_64_bit(left: list[int], right: list[int], shared: int) -> None:
    """Also beside narrow prompts that came before, which are encoded again."""
    plan = plan_batch([[1, 2, 3], [1, 2, 4], left, right])
    assert plan.shared_len.tolist() == [2, 2, shared, shared]
    assert plan.prompt_lens.tolist() == [3, 3, len(left), len(right)]


def test_namespaces_never_share() -> None:
    prompts = [[1, 2, 3], [1, 2, 3], [1, 2, 4], [1, 2, 4], [1, 2, 4]]
    plan = plan_batch(prompts, namespaces=["a", None, "a", None, ("b", 1)])
    assert plan.shared_len.tolist() == [2, 2, 2, 2, 0]
    assert plan.to_compute.sum() == 4 + 4 + 3
    assert plan.group_of[0] == plan.group_of[2] != plan.group_of[1] == plan.group_of[3]
    assert plan.group_of[4] == -1
    assert (plan.tree.parent == 0).sum() == 3


BAD_INPUT: list[tuple[Any, dict[str, Any], str]] = [
    ([[1], [2], [3], []], {}, "prompt 3 is empty; every prompt needs at least one token"),
    (np.empty((2, 0), np.int64), {}, "prompt 0 is empty"),
    (TokenTable(np.array([1, 2]), np.array([0, 1, 1, 2])), {}, "prompt 1 is empty"),
    ([[1], [2.5]], {}, "prompt 1 holds something other than integers"),
    ([[1], [[2]]], {}, "prompt 1 holds something other than integers"),
    (["text"], {}, "prompt 0 has 0 dimensions"),
    ([[1], np.array([1.0])], {}, "prompt 1 has dtype float64"),
    ([[1], np.array([True])], {}, "prompt 1 has dtype bool"),
    ([np.array([[1]])], {}, "prompt 0 has 2 dimensions"),
    ([[1], [2**63]], {}, "prompt 1 has a token id beyond 64 bits"),
    ([np.array([2**63], np.uint64)], {}, "prompt 0 has a token id of 2\\*\\*63 or more"),
    (np.array([1, 2]), {}, "prompts is an array of 1 dimensions"),
    ([[1]], {"page_size": -1}, "page_size is -1"),
    ([[1]], {"page_size": 0}, "page_size is 0"),
    ([[1], [2]], {"expected_output_lens": [1]}, "expected_output_lens has shape"),
    ([[1], [2]], {"expected_output_lens": [1, -4]}, "prompt 1 has expected output length -4"),
    ([[1], [2]], {"expected_output_lens": [1, 0.5]}, "expected_output_lens has dtype float64"),
    ([[1], [2]], {"namespaces": ["a"]}, "namespaces has 1 entries for 2 prompts"),
]


@pytest.mark.parametrize(("prompts", "options", "message"), BAD_INPUT)
def test_bad_input_names_the_prompt_and_the_remedy(
    prompts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_batch(prompts, **options)


@pytest.mark.parametrize(
    ("tokens", "offsets", "message"),
    [
        (np.ones((2, 2), int), np.array([0, 4]), "2 dimensions"),
        (np.ones(4, int), np.array([0.0, 4.0]), "integer array"),
        (np.ones(4, int), np.array([], int), "one entry more"),
        (np.ones(4, int), np.array([1, 4]), "from 0 to the number of tokens, 4"),
        (np.ones(4, int), np.array([0, 5]), "from 0 to the number of tokens, 4"),
        (np.ones(4, int), np.array([0, 3, 2, 4]), "falls at prompt 1"),
        (np.ones(4, int), np.array([0, 3, 2, 4], np.uint64), "falls at prompt 1"),
    ],
)
def test_token_table_checks_its_offsets(
    tokens: np.ndarray, offsets: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenTable(tokens, offsets)


def test_report() -> None:
    prompts = [[1, 1, 1, own] for own in range(3)] + [[2, 2, 2, 2, own] for own in range(2)]
    report = plan_batch([*prompts, [3]]).report
    found = report.to_dict()
    assert found.pop("planning_seconds") > 0
    assert found == {
        "requests": 6,
        "groups": 2,
        "sharing_degree": 2.5,
        "prompt_tokens": 23,
        "distinct_tokens": 13,
        "tokens_saved": 10,
        "saving_ratio": 23 / 13,
        "group_size_quantiles": {
            "min": 2.0, "p25": 2.25, "p50": 2.5, "p75": 2.75, "p90": 2.9, "max": 3.0
        },
        "prefix_len_quantiles": {
            "min": 3.0, "p25": 3.25, "p50": 3.5, "p75": 3.75, "p90": 3.9, "max": 4.0
        },
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found
    assert str(report).splitlines()[:2] == [
        "batch plan: 6 requests, 2 prefix groups, sharing degree 2.50",
        "prompt tokens: 23 in all, 13 to compute, 10 saved (1.77x)",
    ]
    assert len(str(report).splitlines()) == 4
