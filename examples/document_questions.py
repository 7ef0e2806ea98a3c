"""Ask questions about documents, as an `sgl.function` program over a whole batch.

    python examples/document_questions.py --url http://127.0.0.1:30000

runs on any SGLang server. With `--batchllm` the server is handed all prompts at once, and computes
each document once for all questions about it; the program is the same.

`--documents` and `--questions` are files of JSON lines: {"id": ..., "text": ...}, and
{"question": ...}. Without them it asks about a few documents of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import sglang as sgl

DOCUMENTS = [
    {
        "id": "lighthouse",
        "text": "The lighthouse at Carrick Head was lit in 1861. Its lamp burned colza oil until "
        "1907, paraffin until 1968, and has been electric since. Three keepers shared the watch, "
        "each for four hours, until the station was automated in 1987. The tower is 34 metres "
        "high and white, with one red band. Its light shows two flashes every fifteen seconds and "
        "carries eighteen nautical miles in clear weather.",
    },
    {
        "id": "bread",
        "text": "Mix 500 g of strong flour, 350 g of water and 100 g of starter, and leave it for "
        "half an hour. Add 10 g of salt with a little water. Fold the dough four times in two "
        "hours, then let it rise until it has grown by half, about four hours at 24 degrees. "
        "Shape it, and keep it in the refrigerator overnight. Bake it at 250 degrees for twenty "
        "minutes with steam, and at 220 degrees for another twenty without.",
    },
    {
        "id": "minutes",
        "text": "The allotment society met on 3 May with fourteen members present. The treasurer "
        "reported a balance of 412 pounds. It was agreed to repair the north fence before June, "
        "for at most 150 pounds. The waiting list stands at nine. Mrs Okafor will look after the "
        "tool shed from now on. A proposal to keep bees was put off until the insurer has "
        "answered. The next meeting is on 7 June.",
    },
]

QUESTIONS = [
    {"question": "What is this text about, in one sentence?"},
    {"question": "Which numbers does it give, and for what?"},
    {"question": "What happened, or has to happen, first?"},
    {"question": "What does it leave open?"},
]


@sgl.function
def answer_question(s: Any, document: str, question: str) -> None:
    s += sgl.system("You answer questions about a document, from the document only.")
    s += sgl.user(f"Document:\n{document}\n\nQuestion: {question}")
    s += sgl.assistant(sgl.gen("answer"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="default: %(default)s")
    parser.add_argument("--api-key", help="if the server asks for one")
    parser.add_argument("--documents", type=Path, help="JSON lines with id and text")
    parser.add_argument("--questions", type=Path, help="JSON lines with question")
    parser.add_argument("--max-tokens", type=int, default=64, help="default: %(default)s")
    args = parser.parse_args()

    documents = read_lines(args.documents) if args.documents else DOCUMENTS
    questions = read_lines(args.questions) if args.questions else QUESTIONS
    table = list(itertools.product(documents, questions))

    started = time.perf_counter()
    states = answer_question.run_batch(
        [{"document": d["text"], "question": q["question"]} for d, q in table],
        backend=sgl.RuntimeEndpoint(args.url, api_key=args.api_key),
        max_new_tokens=args.max_tokens,
        temperature=0,
        progress_bar=True,
    )
    seconds = time.perf_counter() - started

    failed = computed = asked = 0
    for (document, question), state in zip(table, states, strict=True):
        row = {"id": document["id"], "question": question["question"]}
        if state.error() is None:
            facts = state.get_meta_info("answer")
            asked += facts["prompt_tokens"]
            computed += facts["prompt_tokens"] - facts["cached_tokens"]
            row["answer"] = state["answer"]
        else:
            failed += 1
            row["error"] = str(state.error())
        print(json.dumps(row))
    print(
        f"{len(table)} questions ({failed} failed) in {seconds:.1f} s; "
        f"{computed:,} of {asked:,} prompt tokens computed",
        file=sys.stderr,
    )


def read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


if __name__ == "__main__":
    main()
