"""Outputs that end by themselves at drawn lengths, on a real engine of either side."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from batches import CASES, Case
from bench_offline import argument_parser, run_all, sampling_of
from roofline import floor

KNOWN = Case("known", 24, 8, 40, 8, 12, kv_tokens=4000, longest_output=30)
UNKNOWN = replace(KNOWN, name="unknown", twin="known")


def test_the_twin_differs_only_in_what_is_known_before():
    assert UNKNOWN.prompts(512) == KNOWN.prompts(512)
    assert UNKNOWN.outputs() == KNOWN.outputs()
    assert floor(UNKNOWN) == floor(KNOWN)
    told = [sampling_of(KNOWN, output, 512)["max_new_tokens"] for output in KNOWN.outputs()]
    assert told == KNOWN.outputs()
    untold = {sampling_of(UNKNOWN, n, 512)["max_new_tokens"] for n in UNKNOWN.outputs()}
    assert untold == {UNKNOWN.longest_output}
    assert CASES["mixed-unknown"].prompts(512) == CASES["mixed"].prompts(512)


@pytest.mark.timeout(600)
def test_outputs_end_by_themselves_where_they_are_drawn_to(tiny_model: Path, tmp_path: Path):
    """`bench_offline.measure` checks the lengths, and the reasons that SGLang gives."""
    out = tmp_path / "rows.json"
    command = ["--model", str(tiny_model), "--sides", "fused", "stock", "--load-format", "auto"]
    args = argument_parser("").parse_args(
        [*command, "--options", '{"dtype": "float32"}', "--out", str(out)]
    )
    rows = run_all(args, [UNKNOWN, KNOWN])
    assert json.loads(out.read_text()) == rows
    runs = {(row["case"], row["side"], row["order"]) for row in rows}
    sides = [("fused", "shuffled"), ("stock", "shuffled"), ("stock", "grouped")]
    assert runs == {(case, *side) for case in ("known", "unknown") for side in sides}
    assert all(row["computed_tokens"] == 3 * 40 + 24 * 8 for row in rows if row["side"] == "fused")
