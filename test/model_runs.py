"""What an engine of one model family is put through, in a process of its own."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image, fromarray

from engines import (
    ABORTED_IN_PREFILL,
    VOCAB_SIZE,
    abort_in_prefill,
    flush,
    wait_until_whole,
)
from processes import in_scheduler, stock_scheduler
from prompts import mixed_batch
from steps import read_steps, record_steps
from tiny_models import PATCH, WINDOW

CHUNK = 48
OUTPUT = 12
SHORT_OUTPUT = 6
LONG_OUTPUT = 3 * WINDOW
SCORED = 12
FIRST_TURN = [9, *range(420, 450)]


def greedy(tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}


def batches() -> dict[str, list[list[int]]]:
    """mixed: all kinds of sharing, by prefixes shorter and longer than a window. chain: each prompt
    is a prefix of the next. long: no prompt fits a chunk, and what they do not share is longer than
    a window. labels: two tokens each behind one prefix. groups: two that a chunk holds, each of
    which branches twice."""
    chain = [5, 4, *range(2, 182)]
    shared = [7, *range(300, 370)]
    tail = range(10, 10 + CHUNK + WINDOW)
    return {
        "mixed": mixed_batch(48),
        "chain": [chain[:length] for length in range(182, 2, -4)],
        "long": [[*shared, first, *tail] for first in range(20, 26)],
        "labels": [[8, *range(430, 470), first, 5] for first in range(20, 28)],
        "groups": [
            [*range(50 * group, 50 * group + 20), *end]
            for group in (3, 4)
            for end in ([5, 6, 7], [5, 6, 8], [9, 6, 7], [9, 6, 8])
        ],
        "wide": [p for p in mixed_batch(80, seed=3) if len(p) > 2 * WINDOW][:12],
    }


def questions() -> list[tuple[str, Image]]:
    """Three questions about each of three images, one behind the other."""
    rng = np.random.default_rng(0)
    size = (4 * PATCH, 6 * PATCH, 3)
    images = [fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for _ in range(3)]
    see = "See this: <|vision_start|><|image_pad|><|vision_end|> "
    asked = ("what", "who is there", "how many")
    return [(see + question, image) for question in asked for image in images]


def _url(image: Image) -> str:
    file = BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def _tell_what_is_shared(path: str) -> None:
    """In a scheduler's process: write what decodes through shared prefixes, and how the last layer
    prefills, as the table of docs/models.md has it."""
    scheduler = stock_scheduler()
    prepare = scheduler.init_schedule_policy

    def prepare_and_tell(self: Any) -> None:
        from sglang_batchllm.edge import fusable, last_layer

        prepare(self)
        runner = self.tp_worker.model_runner
        pool = runner.token_to_kv_pool
        layers = fusable.decoding_layers(runner.model, pool)
        shared = sum(fusable.layer_refusal(layer, pool) is None for layer in layers)
        if fusable.model_refusal(runner) is not None:
            shared = 0
        decode = "none" if not shared else "all" if shared == len(layers) else "full"
        end = last_layer._refusal(runner.model.model.layers[-1], self.server_args)
        Path(path).write_text(f"{decode} {'no' if end else 'yes'}")

    scheduler.init_schedule_policy = prepare_and_tell


def run(model: str, options: dict[str, Any], sees: bool, pipe: Any) -> None:
    """Sends {"results": of each batch by name, "reports": one for each, "shared": what decodes
    through shared prefixes, and whether the last layer's end is computed for samples alone,
    "passes": prefill passes of each batch, "mixed": of them those of short answers in which others
    decode, "logprobs": of the first `SCORED` mixed prompts, without
    their first tokens, "programs": see `_programs`, "caught": who was, see `abort_in_prefill`,
    "streamed": tokens that each event of a stream told of}. sees: whether it reads images."""
    from sglang.srt.entrypoints.engine import Engine

    class TellingEngine(Engine):
        pass

    told = Path(model) / "shared"
    in_scheduler(TellingEngine, _tell_what_is_shared, str(told))
    steps = Path(model) / "steps"
    steps.unlink(missing_ok=True)
    record_steps(TellingEngine, steps)
    caught = Path(model) / "caught"
    abort_in_prefill(TellingEngine, caught)
    engine = TellingEngine(
        model_path=model, dtype="float32", sleep_on_idle=True, log_level="warning", **options
    )
    results: dict[str, Any] = {}
    reports: dict[str, Any] = {}
    passes: dict[str, int] = {}

    def keep(name: str, answers: list[dict[str, Any]]) -> None:
        results[name] = [
            {
                "output_ids": answer["output_ids"],
                "computed": _computed(answer["meta_info"]),
            }
            for answer in answers
        ]
        reports[name] = wait_until_whole(engine)
        prefills = sum(step.prefill_requests > 0 for step in read_steps(steps))
        passes[name] = prefills - sum(passes.values())
        flush(engine)

    try:
        for name, prompts in batches().items():
            wide = name == "wide"  # whose outputs are promised to be short
            rids = [f"{name}-{index}{'#out=4' * wide}" for index in range(len(prompts))]
            sampling = greedy(LONG_OUTPUT if wide else OUTPUT)
            keep(name, engine.generate(input_ids=prompts, sampling_params=sampling, rid=rids))
        keep("aborted", _aborted(engine))
        keep("caught", _caught(engine))
        events = engine.generate(
            input_ids=batches()["groups"], sampling_params=greedy(OUTPUT), stream=True
        )
        streamed = [one["meta_info"]["completion_tokens"] for one in events]
        keep("turns", _turns(engine))
        programs = _programs(engine)
        if sees:
            texts, images = zip(*questions(), strict=True)
            urls = [*map(_url, images)]
            keep("images", engine.generate([*texts], greedy(OUTPUT), image_data=urls))
        scored = engine.generate(
            input_ids=batches()["mixed"],
            sampling_params=greedy(1),
            return_logprob=True,
            logprob_start_len=0,
        )
        logprobs = [
            [logprob for logprob, *_ in one["meta_info"]["input_token_logprobs"][1:]]
            for one in scored[:SCORED]
        ]
        keep("scored", scored)
        keep("again", engine.generate(input_ids=batches()["mixed"], sampling_params=greedy(OUTPUT)))
        before = len(read_steps(steps))
        brief = greedy(SHORT_OUTPUT)
        keep("short", engine.generate(input_ids=batches()["mixed"], sampling_params=brief))
        mixed = [s for s in read_steps(steps)[before:] if s.prefill_requests and s.decode_requests]
        shared = told.read_text().split()
        sent = {"results": results, "reports": reports, "shared": shared, "logprobs": logprobs}
        sent |= {"streamed": streamed, "mixed": len(mixed)}
        sent["caught"] = [line.split() for line in caught.read_text().splitlines()]
        pipe.send(sent | {"programs": programs, "passes": passes})
    finally:
        engine.shutdown()


def _computed(info: dict[str, Any]) -> int:
    """0 of a request that was aborted before it ran."""
    return info.get("prompt_tokens", 0) - info.get("cached_tokens", 0)


def _caught(engine: Any) -> list[dict[str, Any]]:
    """The groups, of which some are aborted when they are found with a part of their prompts
    prefilled."""
    prompts = batches()["groups"]
    marked = greedy(OUTPUT) | ABORTED_IN_PREFILL
    sampling = [marked if i in (0, 2, 4) else greedy(OUTPUT) for i in range(len(prompts))]
    rids = [f"caught-{i}" for i in range(len(prompts))]
    return engine.generate(input_ids=prompts, sampling_params=sampling, rid=rids)


def _aborted(engine: Any) -> list[dict[str, Any]]:
    """The mixed batch, of which every third request is aborted soon after it has come."""
    prompts = batches()["mixed"]
    # SGLang aborts all whose id begins with the one that is named.
    rids = [f"aborted-{i:02}" for i in range(len(prompts))]
    sampling = [greedy(OUTPUT if i % 3 else 200) for i in range(len(prompts))]

    async def ask() -> list[dict[str, Any]]:
        task = asyncio.ensure_future(
            engine.async_generate(input_ids=prompts, sampling_params=sampling, rid=rids)
        )
        await asyncio.sleep(0.5)
        for rid in rids[::3]:
            engine.tokenizer_manager.abort_request(rid)
        return await task

    return engine.loop.run_until_complete(ask())


def _turns(engine: Any) -> list[dict[str, Any]]:
    """Two turns of a conversation, the first beside a list. Nobody can know where it ends."""
    short = [[*FIRST_TURN[:9], last] for last in range(20, 24)]
    (answer,) = engine.generate(input_ids=[FIRST_TURN], sampling_params=greedy(OUTPUT))
    flush(engine)
    stop = {**greedy(OUTPUT), "ignore_eos": False, "stop_token_ids": answer["output_ids"][3:4]}

    async def ask() -> Any:
        beside = asyncio.ensure_future(
            engine.async_generate(input_ids=short, sampling_params=greedy(3 * OUTPUT))
        )
        await asyncio.sleep(0.1)
        first = await engine.async_generate(input_ids=FIRST_TURN, sampling_params=stop)
        await beside
        return first

    first = engine.loop.run_until_complete(ask())
    second = [*FIRST_TURN, *first["output_ids"], 8, 9]
    return [first, engine.generate(input_ids=second, sampling_params=greedy(OUTPUT))]


def _programs(engine: Any) -> list[tuple[int, int]]:
    """Programs that ask twice, where any token ends the first answer: of each, how long the first
    prompt was, and how much of the second was in the cache."""
    import sglang

    from sglang_batchllm.edge.engine_backend import EngineBackend

    def ask(s: Any, number: int) -> None:
        s += f"{chr(65 + number)} is what row {number} begins with. Grade:"
        s += sglang.gen("grade", max_tokens=OUTPUT, stop_token_ids=[*range(VOCAB_SIZE)])
        s += " Why? " + sglang.gen("why", max_tokens=2)

    rows = [{"number": number} for number in range(4)]
    backend = EngineBackend(engine, "chatml")
    states = sglang.function(ask).run_batch(rows, backend=backend, temperature=0)
    wait_until_whole(engine)
    flush(engine)
    infos = [(state.get_meta_info("grade"), state.get_meta_info("why")) for state in states]
    return [(first["prompt_tokens"], second["cached_tokens"]) for first, second in infos]


def expected_logprobs(model: Path, prompts: list[list[int]]) -> list[list[float]]:
    """By Hugging Face transformers, of each prompt's tokens without the first."""
    import torch

    reference = _reference(model)
    with torch.inference_mode():
        rows = [
            reference(torch.tensor([prompt]), use_cache=False).logits[0, :-1].log_softmax(-1)
            for prompt in prompts
        ]
    return [
        row.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def _reference(model: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def expected_next(model: Path, prompts: list[list[int]], outputs: list[list[int]]) -> list[Any]:
    """The greedy tokens of Hugging Face transformers, after each prompt and its output so far."""
    import torch

    reference = _reference(model)
    expected = []
    with torch.inference_mode():
        for prompt, output in zip(prompts, outputs, strict=True):
            logits = reference(torch.tensor([prompt + output]), use_cache=False).logits[0]
            expected.append(logits[len(prompt) - 1 : -1].argmax(-1).tolist())
    return expected


def expected_answers(model: Path) -> tuple[list[list[int]], list[list[int]]]:
    """By Hugging Face transformers, of `questions`: the prompts, in which an image is as many equal
    tokens as it takes, and the greedy answers."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    reference = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    prompts, answers = [], []
    for text, image in questions():
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        prompts.append(inputs["input_ids"][0].tolist())
        with torch.inference_mode():
            ids = reference.generate(
                **inputs, do_sample=False, min_new_tokens=OUTPUT, max_new_tokens=OUTPUT
            )
        answers.append(ids[0, len(prompts[-1]) :].tolist())
    return prompts, answers
