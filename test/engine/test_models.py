"""Each family of models: transformers' tokens, no prompt token computed twice, whole pools."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import pytest

from engines import AMPLE, CONTEXT_LENGTH, VOCAB_SIZE
from model_runs import (
    CHUNK,
    FIRST_TURN,
    LONG_OUTPUT,
    OUTPUT,
    SCORED,
    batches,
    expected_answers,
    expected_logprobs,
    expected_next,
    run,
)
from processes import results_of
from prompts import computed_tokens, distinct_tokens
from sglang_batchllm.policy.windowed import LEAST_SAVED
from tiny_models import FAMILIES, make_model

SCARCE = {"max_total_tokens": 400, "chunked_prefill_size": CHUNK}
RECURRENT = [name for name, family in FAMILIES.items() if family.recurrent]
LATENT = ["DeepSeek-V2"]
WINDOWED = [name for name, family in FAMILIES.items() if family.windowed]
FUSED = {"batchllm": True, "batchllm_attention": "fused"}
FEW = SCARCE | {"swa_full_tokens_ratio": 0.4}
FEW_STATES = SCARCE | {"max_mamba_cache_size": 14}
NEWER = {
    "Gemma 4": "SGLang 0.5.17 takes no attention for it that a CPU has",
    "Kimi-Linear": "the transformers of SGLang 0.5.17 does not know it",
}
MOST_TELLING = {"Gemma 3", "Qwen3-MoE", "gpt-oss, few", "Qwen3.5, few"}
EVERY = os.environ.get("ALL_MODELS") == "1"
CASES = [
    pytest.param(
        family,
        options,
        id=name,
        marks=pytest.mark.skipif(
            not EVERY and name not in MOST_TELLING, reason="takes minutes; ALL_MODELS=1 runs it"
        ),
    )
    for family, options, name in (
        *((family, SCARCE, family) for family in FAMILIES),
        *((family, FEW, f"{family}, few") for family in WINDOWED),
        *((family, FEW_STATES, f"{family}, few") for family in RECURRENT),
        *((family, {"max_total_tokens": AMPLE}, f"{family}, ample") for family in WINDOWED[-1:]),
        *((family, {"max_total_tokens": AMPLE}, f"{family}, ample") for family in RECURRENT),
    )
]


DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


def documented() -> dict[str, dict[str, str]]:
    """The rows of the first table of docs/models.md by family, each by column."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]
    return {row["Family"]: row for row in table}


def test_what_the_document_calls_tested_is_tested() -> None:
    assert [family for family, row in documented().items() if row["CPU"] == "yes"] == [*FAMILIES]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    class Made(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            folder = tmp_path_factory.mktemp("model")
            self[family] = make_model(family, folder, VOCAB_SIZE, CONTEXT_LENGTH)
            return self[family]

    return Made()


@pytest.mark.parametrize(("family", "options"), CASES)
def test_a_family(model_of: dict[str, Path], family: str, options: dict[str, Any]) -> None:
    if family in NEWER and importlib.metadata.version("sglang") == "0.5.17":
        pytest.skip(NEWER[family])
    model = model_of[family]
    options = FUSED | dict(FAMILIES[family].options) | options
    sees = FAMILIES[family].vision is not None
    (sent,) = results_of(run, str(model), options, sees)
    results, reports = sent["results"], sent["reports"]
    for name, prompts in batches().items():
        outputs = [one["output_ids"] for one in results[name]]
        assert {len(output) for output in outputs} == {LONG_OUTPUT if name == "wide" else OUTPUT}
        assert outputs == expected_next(model, prompts, outputs), name
        computed = sum(one["computed"] for one in results[name])
        distinct = distinct_tokens(prompts)
        states = reports[name].get("recurrent_states", {"total": AMPLE})
        if name == "chain" and states["total"] < 2 * len(prompts):
            # Each begins the next: a state at the end of the last ones saves little.
            assert computed == computed_tokens(prompts, LEAST_SAVED) > distinct
        else:
            assert computed == distinct, name
        last = reports[name]["batches"][-1]
        assert last["distinct_tokens"] == distinct, name
        assert last["computed_tokens"] == computed, name
        assert last["peak_pinned_tokens"] > 0
        assert not last["relaxed_tokens"] or name == "wide"
    outputs = [one["output_ids"] for one in results["short"]]
    assert outputs == expected_next(model, batches()["mixed"], outputs)
    assert sum(one["computed"] for one in results["short"]) == distinct_tokens(batches()["mixed"])
    mixes = documented()[family]["Decode"] == "all" and family not in (*RECURRENT, *LATENT)
    assert bool(sent["mixed"]) == mixes
    if sees:
        prompts, answers = expected_answers(model)
        assert [one["output_ids"] for one in results["images"]] == answers
        computed = sum(one["computed"] for one in results["images"])
        assert computed < sum(map(len, prompts)) - len(prompts)
    expected = expected_logprobs(model, batches()["mixed"][:SCORED])
    for logprobs, own in zip(sent["logprobs"], expected, strict=True):
        assert logprobs == pytest.approx(own, abs=1e-3)
    assert sum(one["computed"] for one in results["scored"]) == distinct_tokens(batches()["mixed"])

    table = documented()[family]
    assert sent["shared"] == [table["Decode"], table["Last layer"]]

    assert sent["passes"]["labels"] <= 3
    assert sent["passes"]["groups"] <= 3, "the groups' prefixes are computed in one pass"
    caught = dict(sent["caught"])
    for index, one in enumerate(results["caught"]):
        if f"caught-{index}" in caught:
            assert len(one["output_ids"]) <= 1  # the last chunk may have run
        else:
            assert one["output_ids"] == results["groups"][index]["output_ids"]
    assert min(sent["streamed"]) > 0, "nothing is sent of a prompt that goes on"
    assert bool(caught) == (family in RECURRENT)  # no other is in chunks there

    wide = reports["wide"]["batches"][-1]
    assert (wide["retractions"] > 0) == (options["max_total_tokens"] < AMPLE)

    assert [one["output_ids"] for one in results["again"]] == [
        one["output_ids"] for one in results["mixed"]
    ]
    for index, one in enumerate(results["aborted"]):
        if index % 3:
            assert one["output_ids"] == results["mixed"][index]["output_ids"]
    assert reports["aborted"]["batches"][-1]["aborted"] > 0

    first, second = results["turns"]
    prompts = [FIRST_TURN, [*FIRST_TURN, *first["output_ids"], 8, 9]]
    outputs = [first["output_ids"], second["output_ids"]]
    assert len(outputs[0]) <= 4 and outputs == expected_next(model, prompts, outputs)
    if family in RECURRENT:
        assert second["computed"] <= 3  # of which one may be the token that ended the first
    for asked, cached in sent["programs"]:
        assert cached >= asked

    for report in reports.values():
        windows = report.get("window_kv_tokens")
        assert (windows is not None) == (family in WINDOWED)
        if windows is not None:
            assert windows["free_or_evictable"] == windows["total"]
            assert windows["pinned"] == 0
        states = report.get("recurrent_states")
        assert (states is not None) == (family in RECURRENT)
        if states is not None:
            assert states["free_or_evictable"] == states["total"]
            assert states["pinned"] == 0
