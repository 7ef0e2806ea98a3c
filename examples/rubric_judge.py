"""Grade texts against a rubric in two turns, as an `sgl.function` program over a whole batch.

    python examples/rubric_judge.py --url http://127.0.0.1:30000

runs on any SGLang server. The judge first writes its reasons, and then, having read them, gives a
grade that a regular expression constrains. With `--batchllm` the rubric is computed once for all
texts, and the second turn finds the first one's prompt still there; the program is the same.

`--rubric` is a text file, `--texts` a file of JSON lines: {"id": ..., "text": ...}. Without them
it grades a few short letters.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import sglang as sgl

RUBRIC = """Grade the letter from 1 (poor) to 5 (excellent).

Tone: it is polite, and neither cold nor servile. A letter that insults anyone gets a 1.
Purpose: its first two sentences say what the writer wants. Burying it costs one point.
Facts: it gives the dates, names and sums that the reader needs to act. Each missing one costs one
point, down to 2.
Length: nothing is said twice. A letter longer than it has to be loses one point.
Close: it ends by saying what happens next, and by when."""

TEXTS = [
    {
        "id": "deposit",
        "text": "Dear Ms Lind, please return my deposit of 900 euros for the flat at Kirkeveien 4, "
        "which I left on 31 March. The handover sheet, signed by Mr Dahl, lists no damage. My "
        "account is the one from which the rent came. I look forward to it by 30 April. Yours "
        "sincerely, Jon Berg",
    },
    {
        "id": "parcel",
        "text": "Hello, I am writing because I have been a customer for a long time and I have "
        "always been happy, and so has my sister, but this time I am really not happy at all, "
        "since the parcel did not come, and I waited, and it still did not come. Please do "
        "something. Thank you and thank you again.",
    },
    {
        "id": "noise",
        "text": "To the people upstairs: you are impossible. Stop it.",
    },
    {
        "id": "visit",
        "text": "Dear Dr Amin, may our class of 22 visit your laboratory on the morning of 14 May, "
        "or on the 21st? The pupils are sixteen and have just learned about enzymes. We would "
        "come at nine, bring our own coats, and leave by noon. If one of the dates suits you, I "
        "will telephone on Friday to agree on the rest. With kind regards, Eva Roth",
    },
]


@sgl.function
def judge(s: Any, rubric: str, text: str) -> None:
    s += sgl.system("You are a fair and consistent judge. This is your rubric.\n\n" + rubric)
    s += sgl.user("Which points of the rubric does this letter meet, and which not?\n\n" + text)
    s += sgl.assistant(sgl.gen("reasons"))
    s += sgl.user("Now give the grade, as one digit from 1 to 5.")
    s += sgl.assistant(sgl.gen("grade", max_tokens=1, regex="[1-5]"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="default: %(default)s")
    parser.add_argument("--api-key", help="if the server asks for one")
    parser.add_argument("--rubric", type=Path, help="a text file")
    parser.add_argument("--texts", type=Path, help="JSON lines with id and text")
    parser.add_argument(
        "--max-tokens", type=int, default=96, help="of reasons, default: %(default)s"
    )
    args = parser.parse_args()

    rubric = args.rubric.read_text() if args.rubric else RUBRIC
    texts = TEXTS
    if args.texts:
        texts = [json.loads(line) for line in args.texts.read_text().splitlines() if line.strip()]

    started = time.perf_counter()
    states = judge.run_batch(
        [{"rubric": rubric, "text": entry["text"]} for entry in texts],
        backend=sgl.RuntimeEndpoint(args.url, api_key=args.api_key),
        max_new_tokens=args.max_tokens,
        temperature=0,
        progress_bar=True,
    )
    seconds = time.perf_counter() - started

    computed = {"reasons": 0, "grade": 0}
    for entry, state in zip(texts, states, strict=True):
        if state.error() is not None:
            print(json.dumps({"id": entry["id"], "error": str(state.error())}))
            continue
        for turn in computed:
            facts = state.get_meta_info(turn)
            computed[turn] += facts["prompt_tokens"] - facts["cached_tokens"]
        print(json.dumps({"id": entry["id"], "grade": state["grade"], "reasons": state["reasons"]}))
    print(
        f"{len(texts)} texts in {seconds:.1f} s; prompt tokens computed: "
        f"{computed['reasons']:,} in the first turn, {computed['grade']:,} in the second",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
