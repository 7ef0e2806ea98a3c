"""Requests per second on a sample of a real trace, stock SGLang against --batchllm.

    python benchmark/bench_trace.py --model PATH --trace TRACE --out FILE

TRACE: a Mooncake trace, for example `../shared/traces/conversation_trace.jsonl`. Prompts are
random tokens that share what the trace's hash ids share (see `batches.TraceSample`), outputs are
as long as the trace says, and everything else is as in `bench_offline.py`: one process per side,
warm-up excluded, stock SGLang at the better of shuffled and grouped prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

from batches import TRACE_REQUESTS, TraceSample
from bench_offline import argument_parser, print_table, run_all


def main() -> None:
    parser = argument_parser((__doc__ or "").splitlines()[0])
    parser.set_defaults(sides=["fused", "stock"])
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=TRACE_REQUESTS, help="at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of conversations")
    args = parser.parse_args()
    context = json.loads((Path(args.model) / "config.json").read_text())["max_position_embeddings"]
    sample = TraceSample.of(args.trace, args.requests, args.seed, context)
    prompt_tokens = sum(length for length, _, _ in sample.lines)
    print(
        f"{sample.requests} requests of {prompt_tokens / sample.requests:.0f} prompt and "
        f"{sample.output} output tokens on average; "
        f"{1 - sample.distinct_tokens / prompt_tokens:.1%} of the prompt tokens repeat others"
    )
    print_table(run_all(args, [sample]))


if __name__ == "__main__":
    main()
