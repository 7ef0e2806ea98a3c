"""Prompt tokens that SGLang itself computes, release against release, without a GPU.

`python benchmark/bench_stock_releases.py --out FILE`, once in an environment of each release. The
cases are those of the simulator with a tenth of the tokens and half the requests, on the CPU
platform and a tiny model, each shuffled and with the members of a group one after the other.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from batches import CASES, Case
from processes import flush, results_of
from results_file import ResultFile
from tiny_model import make_tiny_model

VOCABULARY = 512
CONTEXT = 2048
CHUNK = 819
AMPLE = 120_000
REFRESH = "SGLANG_ENABLE_WAITING_PREFIX_REFRESH"
NAMES = ("M1", "M3", "M4", "M5", "M6")


def small(case: Case) -> Case:
    return replace(
        case,
        requests=case.requests // 2,
        prefix=case.prefix // 10,
        suffix=case.suffix // 10,
        output=case.output // 10,
        kv_tokens=case.kv_tokens and case.kv_tokens // 20,
    )


def run(model: Path, kv_tokens: int, cases: list[Case], pipe: Connection) -> None:
    """Sends a row for each case and order."""
    import sglang as sgl

    engine = sgl.Engine(
        model_path=str(model),
        dtype="float32",
        max_total_tokens=kv_tokens,
        chunked_prefill_size=CHUNK,
        log_level="error",
    )
    try:
        for case in cases:
            prompts, outputs = case.prompts(VOCABULARY), case.outputs()
            grouped = sorted(range(len(prompts)), key=prompts.__getitem__)
            for order, rows in (("shuffled", range(len(prompts))), ("grouped", grouped)):
                flush(engine)
                answers: Any = engine.generate(
                    input_ids=[prompts[row] for row in rows],
                    sampling_params=[
                        {"temperature": 0, "max_new_tokens": outputs[row], "ignore_eos": True}
                        for row in rows
                    ],
                )
                facts = [answer["meta_info"] for answer in answers]
                computed = sum(fact["prompt_tokens"] - fact["cached_tokens"] for fact in facts)
                pipe.send(
                    {
                        "case": case.name,
                        "order": order,
                        "kv_tokens": kv_tokens,
                        "prompt_tokens": sum(fact["prompt_tokens"] for fact in facts),
                        "distinct_tokens": case.distinct_tokens,
                        "computed_tokens": computed,
                    }
                )
    finally:
        engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    args = parser.parse_args()
    file = ResultFile(args.out, ("sglang", "refresh", "case", "order"))
    release = importlib.metadata.version("sglang")
    cases = [small(case) for case in CASES.values() if case.name in NAMES]
    os.environ["OMP_NUM_THREADS"] = "1"
    print("| SGLang | refresh | case | order | prompt | distinct | computed |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder), ["a"], VOCABULARY, CONTEXT)
        for refresh in ("none",) if release == "0.5.17" else ("on", "off"):
            os.environ[REFRESH] = "0" if refresh == "off" else "1"
            for kv_tokens in sorted({case.kv_tokens or AMPLE for case in cases}):
                chosen = [case for case in cases if (case.kv_tokens or AMPLE) == kv_tokens]
                for found in results_of(run, model, kv_tokens, chosen):
                    row = file.add({"sglang": release, "refresh": refresh, **found})
                    print(
                        f"| {release} | {refresh} | {row['case']} | {row['order']} "
                        f"| {row['prompt_tokens']:,} | {row['distinct_tokens']:,} "
                        f"| {row['computed_tokens']:,} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
