"""Prompts with text: windows of this machine's Python sources, and models that have a tokenizer.

Only sizes are those of a real model: weights are random, so answers mean nothing and cost the same.

`python benchmark/texts.py MODEL FOLDER` makes a folder with MODEL's config.json and a tokenizer. A
benchmark that has it as its `--model` spends no time on training one.
"""

from __future__ import annotations

import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from batches import Case

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

from tiny_model import make_tiny_model, train_tokenizer

VOCAB_SIZE = 32_000
SOURCE_BYTES = 24_000_000

TINY_VOCAB_SIZE = 4096
TINY_CONTEXT_LENGTH = 8192
TINY_SOURCE_BYTES = 1_000_000
TINY_FLAGS = ["--dtype", "float32", "--max-total-tokens", "60000"]
SHRINK = 10
"""For the tiny model, cases have so many times fewer requests, and tokens in each."""

Prompts = list[tuple[str, str]]
"""Document and question, shuffled."""

Body = dict[str, Any]
"""Of a request of /v1/chat/completions."""


def python_sources(num_bytes: int = SOURCE_BYTES) -> Iterator[str]:
    """Sources of the standard library and of installed packages, about `num_bytes` of them."""
    left = num_bytes
    for root in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(root)).rglob("*.py")):
            if left <= 0:
                return
            if root == "purelib" or "site-packages" not in path.parts:
                text = path.read_text(encoding="utf-8", errors="ignore")
                left -= len(text)
                yield text


def model_and_flags(model: Path | None, folder: Path) -> tuple[Path, list[str]]:
    """The folder of a model that has a tokenizer, and a server's flags for it.

    model: a folder with a config.json; None for a tiny model, for machines without a GPU. Where it
    has no tokenizer, the model gets one in `folder`.
    """
    if model is None:
        # Matrices this small gain nothing from threads, and lose much where cores are shared.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        sources = python_sources(TINY_SOURCE_BYTES)
        made = make_tiny_model(folder, sources, TINY_VOCAB_SIZE, TINY_CONTEXT_LENGTH)
    elif (model / "tokenizer.json").exists():
        made = model
    else:
        made = folder
        folder.mkdir(parents=True, exist_ok=True)
        config = json.loads((model / "config.json").read_text())
        train_tokenizer(folder, python_sources(), min(VOCAB_SIZE, config["vocab_size"]))
        config |= {"bos_token_id": 0, "eos_token_id": 1}  # of that tokenizer
        (folder / "config.json").write_text(json.dumps(config))
    flags = ["--model-path", str(made), "--load-format", "dummy"]
    return made, flags + (TINY_FLAGS if model is None else [])


def shrunk(case: Case) -> Case:
    """For the tiny model. Its memory is as scarce as before."""
    groups = max(case.requests // SHRINK // case.sharing_degree, 1)
    return replace(
        case,
        name=f"tiny {case.name}",
        requests=groups * case.sharing_degree,
        prefix=case.prefix // SHRINK,
        suffix=case.suffix // SHRINK,
        output=case.output // SHRINK,
        kv_tokens=case.kv_tokens and case.kv_tokens // SHRINK**2,
    )


def make_prompts(case: Case, model: Path, seed: int) -> Prompts:
    """Windows of the sources, about as long in tokens as `case` says."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = random.Random(seed)
    files = list(python_sources())
    texts: list[str] = []
    offsets: list[int] = []  # of tokens, in all texts together
    length = 0
    documents = case.requests // case.sharing_degree
    wanted = 2 * (documents * case.prefix + case.requests * case.suffix)
    while len(offsets) < wanted:
        text = rng.choice(files)
        encoded = tokenizer(text, return_offsets_mapping=True)
        offsets += [length + start for start, _ in encoded["offset_mapping"]]
        texts.append(text)
        length += len(text)
    pool = "".join(texts)

    def window(tokens: int) -> str:
        first = rng.randrange(len(offsets) - tokens)
        return pool[offsets[first] : offsets[first + tokens]]

    prompts: Prompts = []
    for _ in range(documents):
        document = window(case.prefix)
        prompts += [(document, window(case.suffix)) for _ in range(case.sharing_degree)]
    rng.shuffle(prompts)
    return prompts


def chat_bodies(prompts: Prompts, output: int) -> list[Body]:
    """The document is the system's message, so that its end is the same for all who share it."""
    return [
        {
            "messages": [
                {"role": "system", "content": document},
                {"role": "user", "content": question},
            ],
            "max_tokens": output,
            "temperature": 0,
            "ignore_eos": True,
        }
        for document, question in prompts
    ]


def batch_lines(bodies: list[Body]) -> Iterator[str]:
    """Lines of a batch file; each row's custom_id is its place."""
    for place, body in enumerate(bodies):
        row = {"custom_id": str(place), "method": "POST", "url": "/v1/chat/completions"}
        yield json.dumps({**row, "body": body}) + "\n"


if __name__ == "__main__":
    print(model_and_flags(Path(sys.argv[1]), Path(sys.argv[2]))[0])
