"""lm-evaluation-harness, unchanged, on stock SGLang and on --batchllm: scores and computed tokens.

    pip install 'lm_eval[api]==0.4.13'
    python benchmark/bench_lm_eval.py --out FILE

Two few-shot tasks of this file's making: multiple choice, and generation. Both go through the
harness's `sglang` model, which starts an engine, and through its `local-completions`, which sends
lists of prompts to a server. The model is a tiny random one, in float32, so that both sides should
score the very same; `--model PATH` takes another. A table at the end says what each computed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from processes import results_of
from results_file import ResultFile, Row
from servers import starting
from texts import make_tiny_model

SIDES: dict[str, dict[str, Any]] = {"batchllm": {"batchllm": True}, "stock": {}}
COLOURS = ["red", "green", "blue", "white", "black", "brown"]
THINGS = ["box", "bag", "cup", "hat", "door", "boat", "lamp", "coat"]
CHOICES = 4
SHOTS = 12
CONTEXT_LENGTH = 2048
MAX_TOTAL_TOKENS = 60_000
AT_ONCE = 4
PROMPTS_OF_A_REQUEST = 16

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/{name}-train.jsonl
    test: {folder}/{name}-test.jsonl
fewshot_split: train
test_split: test
num_fewshot: {shots}
fewshot_config: {{sampler: first_n}}
doc_to_text: "{{{{question}}}}"
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
"""


def colour_of(rng: random.Random) -> dict[str, Any]:
    """A question with a colour as its answer."""
    things, colours = rng.sample(THINGS, 3), rng.sample(COLOURS, CHOICES)
    facts = ", ".join(f"a {c} {t}" for t, c in zip(things, colours, strict=False))
    asked = rng.randrange(len(things))
    question = f"Ann has {facts}. Which colour is the {things[asked]}?\nAnswer:"
    answer = colours[asked]
    rng.shuffle(colours)
    return {"question": question, "choices": colours, "answer": colours.index(answer)}


def last_of(rng: random.Random) -> dict[str, Any]:
    """A question whose answer is written."""
    things = rng.sample(THINGS, 4)
    return {"question": f"List: {' '.join(things)}\nLast:", "answer": things[-1]}


def write_tasks(folder: Path, questions: int) -> list[str]:
    """Task files and their data; returns the tasks' names."""
    for name, make, kind in (("colours", colour_of, CHOOSE), ("last", last_of, WRITE)):
        rng = random.Random(name)
        for split, count in (("train", SHOTS), ("test", questions)):
            lines = [json.dumps(make(rng)) for _ in range(count)]
            (folder / f"{name}-{split}.jsonl").write_text("\n".join(lines) + "\n")
        head = TASK.format(name=name, folder=folder, shots=SHOTS)
        (folder / f"{name}.yaml").write_text(head + kind)
    return ["colours", "last"]


def evaluate(
    task: str, tasks_folder: Path, model: str, arguments: dict[str, Any], **more: Any
) -> Row:
    """The scores of one task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(tasks_folder), include_defaults=False),
        bootstrap_iters=0,
        **more,
    )
    assert found is not None
    scores = found["results"][task]
    return {
        name.split(",")[0]: value
        for name, value in scores.items()
        if isinstance(value, float) and "stderr" not in name
    }


def run_engine(folder: Path, tasks: Sequence[str], model: str, side: str, pipe: Any) -> None:
    """Each task through the harness's `sglang` model; sends a row for each."""
    import sglang
    from sglang.srt.entrypoints.engine import Engine

    started: list[Engine] = []

    class Counted(Engine):
        """Counts prompt tokens; the harness asks for a CUDA device, which may not be there."""

        prompt_tokens = computed_tokens = 0

        def __init__(self, **options: Any):
            if not torch.cuda.is_available():
                del options["device"]
            super().__init__(**options)
            started.append(self)

        def generate(self, *args: Any, **options: Any) -> Any:
            results = super().generate(*args, **options)
            for info in (result["meta_info"] for result in results):
                Counted.prompt_tokens += info["prompt_tokens"]
                Counted.computed_tokens += info["prompt_tokens"] - info["cached_tokens"]
            return results

    sglang.Engine = Counted  # type: ignore[misc]
    arguments = {"pretrained": model, "dtype": "float32", "mem_fraction_static": 0.5}
    arguments["max_total_tokens"] = MAX_TOTAL_TOKENS
    for task in tasks:
        Counted.prompt_tokens = Counted.computed_tokens = 0
        scores = evaluate(task, folder, "sglang", arguments | SIDES[side], batch_size="auto")
        started.pop().shutdown()  # the harness leaves it running
        counted = {"prompt": Counted.prompt_tokens, "computed": Counted.computed_tokens}
        pipe.send({"task": task, "scores": scores, **counted})


def run_server(folder: Path, tasks: Sequence[str], model: str, side: str) -> Iterator[Row]:
    """Each task through the harness's `local-completions`; a row for each."""
    flags = ["--model-path", model, "--dtype", "float32", "--enable-metrics"]
    flags += ["--max-total-tokens", str(MAX_TOTAL_TOKENS)]
    flags += ["--batchllm"] if side == "batchllm" else []
    with starting(flags, f"lm-eval-{side}") as server:
        server.wait_until_ready()
        arguments = {
            "model": model,
            "base_url": f"{server.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "num_concurrent": AT_ONCE,
            "max_length": CONTEXT_LENGTH,
        }
        for task in tasks:
            urllib.request.urlopen(f"{server.url}/flush_cache?timeout=30", data=b"").read()
            before = counters(server.url)
            scores = evaluate(
                task, folder, "local-completions", arguments, batch_size=PROMPTS_OF_A_REQUEST
            )
            prompt, cached = (b - a for a, b in zip(before, counters(server.url), strict=True))
            counted = {"prompt": prompt, "computed": prompt - cached}
            yield {"task": task, "scores": scores, **counted}


def counters(url: str) -> tuple[int, int]:
    """Prompt tokens that the server has taken, and those of them that were cached."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()

    def total(name: str) -> int:
        found = re.findall(rf"^sglang:{name}_total\{{.*\}} (\S+)$", text, re.MULTILINE)
        return int(sum(map(float, found)))

    return total("prompt_tokens"), total("cached_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="model folder; default: a tiny random one is made")
    parser.add_argument("--questions", type=int, default=200, help="of each task")
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    args = parser.parse_args()
    file = ResultFile(args.out, ("task", "through", "side"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks = write_tasks(folder, args.questions)
        texts = [path.read_text() for path in folder.glob("*.jsonl")]
        model = args.model or str(make_tiny_model(folder / "model", texts, 512, CONTEXT_LENGTH))
        rows: list[Row] = []
        for side in SIDES:
            for row in results_of(run_engine, folder, tasks, model, side):
                rows.append(file.add({"through": "engine", "side": side, **row}))
            for row in run_server(folder, tasks, model, side):
                rows.append(file.add({"through": "server", "side": side, **row}))
    print_table(rows)


def print_table(rows: Sequence[Row]) -> None:
    print("| task | through | side | scores | prompt tokens | computed |")
    print("|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["task"], row["through"], row["side"])):
        scores = ", ".join(f"{name} {value:.4f}" for name, value in row["scores"].items())
        cells = [row["task"], row["through"], row["side"], scores]
        cells += [f"{row['prompt']:,}", f"{row['computed']:,}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
