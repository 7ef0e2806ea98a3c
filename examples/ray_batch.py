"""Answer a file of chat requests with Ray Data, on as many replicas as there are.

    python examples/ray_batch.py --model .quickstart/tiny-chat-llama --num-gpus 0

runs two replicas on the CPU, with the tiny model that the quickstart leaves; `--model
meta-llama/Llama-3.1-8B-Instruct --replicas 8` takes a GPU for each, on all hosts of the Ray cluster
that `RAY_ADDRESS` names.

The records go to a folder of Parquet files. The same command goes on where an earlier one was
stopped, by Ray's own checkpoints; what is printed is of all records.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import ray
from ray.data.checkpoint import CheckpointConfig
from ray.data.llm import build_processor

from sglang_batchllm import plan_batch
from sglang_batchllm.ray_data.processor import BatchLLMProcessorConfig

TICKETS = Path(__file__).with_name("tickets.jsonl")
CPU_ENGINE = {"max_total_tokens": 20_000, "dtype": "float32"}  # its own choice would be float16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--input", type=Path, default=TICKETS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("ray_answers"), help="a folder")
    parser.add_argument("--replicas", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--window", type=int, help="rows that are planned together; default: all")
    parser.add_argument("--num-gpus", type=float, help="of a replica; default: one")
    parser.add_argument("--max-tokens", type=int, default=16, help="default: %(default)s")
    args = parser.parse_args()
    out = args.out.resolve()

    if args.num_gpus == 0:  # an engine and Ray's own steps sleep most of the time
        ray.init(num_cpus=args.replicas + 6, include_dashboard=False)
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column="custom_id",
        checkpoint_path=str(out / "checkpoint"),
        delete_checkpoint_on_success=False,
    )
    config = BatchLLMProcessorConfig(
        model_source=args.model,
        concurrency=args.replicas,
        window=args.window,
        num_gpus=args.num_gpus,
        engine_kwargs=CPU_ENGINE if args.num_gpus == 0 else {},
    )
    sampling = {"temperature": 0, "max_new_tokens": args.max_tokens}
    processor = build_processor(
        config,
        preprocess=lambda row: {"messages": row["body"]["messages"], "sampling_params": sampling},
        postprocess=record,
    )
    processor(ray.data.read_json(str(args.input))).write_parquet(str(out / "records"))
    # Each by itself: columns that are empty in one file have no type there.
    files = sorted((out / "records").glob("*.parquet"))
    tell([one for file in files for one in pyarrow.parquet.read_table(file).to_pylist()])


def record(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row; one that failed is kept whole."""
    names = ("custom_id", "generated_text", "prompt_token_ids", "num_cached_tokens", "batch_uuid")
    return {name: row[name] for name in names}


def tell(records: Sequence[dict[str, Any]]) -> None:
    done = [one for one in records if not one.get("__inference_error__")]
    partitions: dict[str, list[list[int]]] = {}
    for one in done:
        partitions.setdefault(one["batch_uuid"], []).append(one["prompt_token_ids"])
    every = [prompt for prompts in partitions.values() for prompt in prompts]
    distinct = distinct_tokens(every)
    facts = {
        "records": len(records),
        "failed": len(records) - len(done),
        "partitions": len(partitions),
        "prompt_tokens": sum(map(len, every)),
        "distinct_tokens": distinct,
        "repeated_by_partitions": sum(map(distinct_tokens, partitions.values())) - distinct,
        "computed_tokens": sum(
            len(one["prompt_token_ids"]) - one["num_cached_tokens"] for one in done
        ),
    }
    print(json.dumps(facts))


def distinct_tokens(prompts: list[list[int]]) -> int:
    return plan_batch(prompts, 1).report.distinct_tokens if prompts else 0


if __name__ == "__main__":
    main()
