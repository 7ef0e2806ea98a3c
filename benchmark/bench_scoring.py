"""Logprobs of prompts that share few-shot prefixes: stock SGLang against --batchllm.

    python benchmark/bench_scoring.py --model PATH --out FILE

As in multiple-choice evaluation: tasks with a long common prefix, questions below it, and a request
for each choice, which asks for the logprobs of its whole prompt with the two likeliest tokens (as
lm-evaluation-harness's `sglang` model does), or of its choice alone. Each side runs in a process of
its own, each case after a warm-up with other tokens; stock SGLang runs every case twice, prompts
shuffled and prompts sorted, and is quoted at the better.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_offline import ENGINE_OPTIONS
from processes import flush, results_of
from results_file import ResultFile

SIDES: dict[str, dict[str, Any]] = {"batchllm": {"batchllm": True}, "stock": {}}
CASES = ("whole prompt", "choice")
SAMPLING = {"temperature": 0, "max_new_tokens": 1}


@dataclass(frozen=True)
class Evaluation:
    """Numbers of tasks, of questions of each and of choices of each of these; and the tokens of a
    task's prefix, of a question and of a choice."""

    tasks: int = 4
    questions: int = 100
    choices: int = 4
    prefix: int = 1200
    question: int = 60
    choice: int = 6

    @property
    def distinct_tokens(self) -> int:
        below = self.questions * (self.question + self.choices * self.choice)
        return self.tasks * (self.prefix + below)

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        """Token ids, shuffled."""
        rng = random.Random(seed)
        prompts = []
        for _ in range(self.tasks):
            prefix = rng.choices(range(vocab_size), k=self.prefix)
            for _ in range(self.questions):
                question = rng.choices(range(vocab_size), k=self.question)
                firsts = rng.sample(range(vocab_size), self.choices)
                for first in firsts:
                    rest = rng.choices(range(vocab_size), k=self.choice - 1)
                    prompts.append([*prefix, *question, first, *rest])
        rng.shuffle(prompts)
        return prompts

    def asked(self, case: str) -> dict[str, Any]:
        """What each request of a case asks for. A row tells of the token after it, so the choice's
        begin with that of the question's last token."""
        if case == "whole prompt":
            return {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
        return {"return_logprob": True, "logprob_start_len": self.prefix + self.question - 1}


def run_side(
    options: dict[str, Any], evaluation: Evaluation, cases: Sequence[str], side: str, pipe: Any
) -> None:
    """Start an engine, run `cases`, send one result per run through `pipe`."""
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(**options, **SIDES[side])
    vocab_size = engine.tokenizer_manager.model_config.vocab_size
    try:
        for case in cases:
            asked = evaluation.asked(case)
            warm_up = evaluation.prompts(vocab_size, seed=1)[:64]
            engine.generate(input_ids=warm_up, sampling_params=SAMPLING, **asked)
            for order in ["shuffled", "grouped"] if side == "stock" else ["shuffled"]:
                prompts = evaluation.prompts(vocab_size)
                if order == "grouped":
                    prompts.sort()
                flush(engine)
                started = time.perf_counter()
                results = engine.generate(input_ids=prompts, sampling_params=SAMPLING, **asked)
                seconds = time.perf_counter() - started
                infos = [result["meta_info"] for result in results]
                start = asked["logprob_start_len"]
                assert all(
                    len(info["input_token_logprobs"]) == len(prompt) - start
                    for info, prompt in zip(infos, prompts, strict=True)
                )
                tokens = sum(map(len, prompts))
                pipe.send(
                    {
                        "case": case,
                        "side": side,
                        "order": order,
                        "seconds": seconds,
                        "requests_per_second": len(prompts) / seconds,
                        "prompt_tokens": tokens,
                        "distinct_tokens": evaluation.distinct_tokens,
                        "computed_tokens": tokens - sum(info["cached_tokens"] for info in infos),
                    }
                )
    finally:
        engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--questions", type=int, default=Evaluation.questions, help="of each task")
    parser.add_argument("--prefix", type=int, default=Evaluation.prefix, help="tokens")
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="more engine arguments for every side (JSON)"
    )
    args = parser.parse_args()
    evaluation = Evaluation(questions=args.questions, prefix=args.prefix)
    options = {"model_path": args.model, "load_format": args.load_format, **ENGINE_OPTIONS}
    options |= args.options
    file = ResultFile(args.out, ("case", "side", "order"))
    best: dict[tuple[str, str], float] = {}
    for side in args.sides:
        for result in results_of(run_side, options, evaluation, args.cases, side):
            print(json.dumps(file.add({**result, "engine_options": args.options})), flush=True)
            key = result["case"], side
            best[key] = max(best.get(key, 0.0), result["requests_per_second"])
    for case in args.cases:
        rates = [best[case, side] for side in args.sides]
        ratio = f", {rates[0] / rates[-1]:.2f} times" if len(rates) > 1 else ""
        print(f"{case}: {', '.join(f'{rate:.1f}' for rate in rates)} requests/s{ratio}")


if __name__ == "__main__":
    main()
