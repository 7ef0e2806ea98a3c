"""Several samples of each prompt (`n`), as in RL rollouts: stock SGLang against --batchllm.

    python benchmark/bench_rollouts.py                           a tiny model, on any machine
    python benchmark/bench_rollouts.py --model PATH --out FILE --options '{"load_format": "dummy"}'

All prompts go in one call, each with `n` in its sampling parameters. Samples are drawn at
temperature 1 and end by themselves (endings.py) at geometric lengths, which nobody knows before.
Each side runs in a process of its own, after a warm-up with other tokens, whose
outputs are an eighth as long.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batches import Case
from bench_offline import ENGINE_OPTIONS
from endings import end_as_drawn, samples_ending_after
from processes import flush, results_of
from results_file import ResultFile
from steps import read_steps, record_steps
from texts import TINY_CONTEXT_LENGTH, TINY_VOCAB_SIZE, make_tiny_model

SIDES: dict[str, dict[str, Any]] = {"batchllm": {"batchllm": True}, "stock": {}}


@dataclass(frozen=True)
class Rollouts:
    """prompts: how many, of `tokens` each; samples: of each prompt, with `output` tokens on
    average, cut at `limit`."""

    prompts: int
    samples: int
    tokens: int
    output: int
    limit: int

    @property
    def name(self) -> str:
        return f"{self.prompts} x {self.samples}, {self.tokens} / {self.output}"

    def batch(self, vocab_size: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the prompts, and the lengths of each one's samples."""
        requests = self.prompts * self.samples
        case = Case("prompts", self.prompts, 1, 0, self.tokens, 1)
        ends = Case("samples", requests, 1, 0, 0, self.output, longest_output=self.limit).outputs()
        firsts = range(0, requests, self.samples)
        return case.prompts(vocab_size, seed), [ends[i : i + self.samples] for i in firsts]


def run_side(
    options: dict[str, Any], rollouts: Rollouts, side: str, steps: bool, pipe: Any
) -> None:
    """Start an engine, run the samples of other prompts and then those that count."""
    from sglang.srt.entrypoints.engine import Engine

    steps_file = Path(tempfile.mkdtemp()) / "steps"
    if steps:
        record_steps(Engine, steps_file)
    end_as_drawn(Engine)
    engine = Engine(**options, **SIDES[side])
    vocab_size = engine.tokenizer_manager.model_config.vocab_size
    started, seconds, results = 0.0, 0.0, []
    try:
        for seed, shorter in ((1, 8), (0, 1)):
            prompts, lengths = rollouts.batch(vocab_size, seed)
            lengths = [[-(-end // shorter) for end in ends] for ends in lengths]
            sampling = [
                samples_ending_after(ends, rollouts.limit, vocab_size - 1, prompt)
                for prompt, ends in enumerate(lengths)
            ]
            flush(engine)
            started = time.perf_counter()
            results = engine.generate(input_ids=prompts, sampling_params=sampling)
            seconds = time.perf_counter() - started
        infos = [result["meta_info"] for result in results]
        for prompt, ends in enumerate(lengths):
            of_prompt = infos[prompt * rollouts.samples :][: rollouts.samples]
            assert sorted(info["completion_tokens"] for info in of_prompt) == sorted(ends)
        ran = [step for step in read_steps(steps_file) if step.start >= started] if steps else []
        pipe.send(
            {
                "steps": [[round(x, 5) for x in asdict(step).values()] for step in ran],
                "case": rollouts.name,
                "side": side,
                "seconds": seconds,
                "samples_per_second": len(infos) / seconds,
                "output_tokens": sum(map(sum, lengths)),
                "computed_tokens": sum(i["prompt_tokens"] - i["cached_tokens"] for i in infos),
                "distinct_tokens": rollouts.prompts * rollouts.tokens,
                "retractions": sum(info["num_retractions"] for info in infos),
            }
        )
    finally:
        engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="model folder; a tiny one is made if none is given")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--steps", type=Path, help="record every forward step in this file")
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="more engine arguments for every side (JSON)"
    )
    args = parser.parse_args()
    options = {**ENGINE_OPTIONS, **args.options, "model_path": args.model}
    rollouts = Rollouts(prompts=64, samples=16, tokens=600, output=300, limit=1500)
    if args.model is None:
        folder = Path(tempfile.mkdtemp()) / "model"
        make_tiny_model(folder, [__doc__ or ""], TINY_VOCAB_SIZE, TINY_CONTEXT_LENGTH)
        options |= {"model_path": str(folder), "dtype": "float32", "max_total_tokens": 60_000}
        rollouts = Rollouts(prompts=16, samples=4, tokens=60, output=10, limit=50)
    file = ResultFile(args.out, ("case", "side"))
    recorded = []
    for side in args.sides:
        for result in results_of(run_side, options, rollouts, side, args.steps is not None):
            recorded.append({**result})
            del result["steps"]
            print(json.dumps(file.add({**result, "engine_options": args.options})), flush=True)
    if args.steps is not None:
        args.steps.write_text(json.dumps(recorded))


if __name__ == "__main__":
    main()
