"""The flag: where it is heard, what it refuses, and that nothing happens without it."""

import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from sglang_batchllm.args import BatchLLMServerArgs, UnsupportedError

_RUN_AS_OTHER_VERSION = """
import runpy, sys
import sglang_batchllm
sglang_batchllm.SGLANG_VERSION = "0.0.1"
sys.argv = ["launch_server", *sys.argv[1:]]
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def commands(tiny_model: Path) -> dict[str, Future[subprocess.CompletedProcess[str]]]:
    """All commands at once: most of each is waiting for imports."""
    python = sys.executable
    launch, other = [python, "-m", "sglang.launch_server"], [python, "-c", _RUN_AS_OTHER_VERSION]
    switched_on = ["--batchllm", "--model-path", str(tiny_model)]
    words = {
        "help": [*launch, "--help"],
        "serve help": [str(Path(python).with_name("sglang")), "serve", "--help"],
        "refused": [*launch, *switched_on, "--enable-hierarchical-cache"],
        "version": [*other, *switched_on],
        "other version": [*other, "--help"],
    }
    pool = ThreadPoolExecutor(2)
    return {
        name: pool.submit(subprocess.run, command, capture_output=True, text=True, timeout=240)
        for name, command in words.items()
    }


@pytest.mark.parametrize("name", ["help", "serve help"])
def test_the_flags_are_in_the_help(commands, name):
    result = commands[name].result()
    assert "--batchllm " in result.stdout
    assert "--batchllm-gather-ms" in result.stdout


def test_an_unsupported_flag_ends_the_start_with_one_sentence(commands):
    result = commands["refused"].result()
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == (
        "error: --batchllm does not support --enable-hierarchical-cache; "
        "pinned prefixes stay on the device, so leave it out."
    )
    assert "Traceback" not in result.stderr


def test_another_sglang_version_is_refused_with_one_sentence(commands):
    result = commands["version"].result()
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --batchllm needs SGLang 0.0.1, but SGLang 0.5.17 is installed")
    assert "pip install" in last
    assert "Traceback" not in result.stderr


def test_another_sglang_version_works_without_the_flag(commands):
    result = commands["other version"].result()
    assert result.returncode == 0
    assert "--batchllm-gather-ms" not in result.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm"),
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode"),
        ({"pp_size": 2}, "--pp-size"),
        ({"dp_size": 2}, "--dp-size"),
        ({"enable_session_radix_cache": True}, "--enable-session-radix-cache"),
        ({"disable_radix_cache": True}, "--disable-radix-cache"),
        ({"schedule_policy": "lpm"}, "--schedule-policy"),
        ({"radix_cache_backend": "flexkv"}, "--radix-cache-backend"),
        ({"batchllm_gather_ms": -1.0}, "--batchllm-gather-ms"),
        (
            {"batchllm_attention": "fused", "decode_attention_backend": "triton"},
            "--decode-attention-backend triton",
        ),
    ],
)
def test_unsupported_options_are_named(tiny_model, options, named):
    with pytest.raises(UnsupportedError, match=named):
        BatchLLMServerArgs(model_path=str(tiny_model), batchllm=True, **options)


def test_arguments_without_the_flag_are_stock(tiny_model):
    args = BatchLLMServerArgs(model_path=str(tiny_model), schedule_policy="lpm")
    assert args.radix_cache_backend is None
    assert not args.batchllm


@pytest.mark.parametrize(
    ("options", "largest"),
    [
        ({"batchllm": True}, 256),  # a full step runs eagerly
        ({"batchllm": True, "cuda_graph_max_bs_prefill": 512}, 512),
        ({}, 512),
    ],
)
def test_prefill_graphs_reach_half_a_chunk_unless_told_otherwise(tiny_model, options, largest):
    args = BatchLLMServerArgs(model_path=str(tiny_model), chunked_prefill_size=512, **options)
    prefill = args.cuda_graph_config.prefill
    assert prefill.max_bs == max(prefill.bs) == largest


def test_without_the_flag_the_scheduler_is_stock(monkeypatch):
    from types import SimpleNamespace

    from sglang_batchllm.runtime.scheduler import BatchLLMScheduler

    stock = BatchLLMScheduler.__base__
    monkeypatch.setattr(stock, "__init__", lambda self, *args: None)
    assert type(BatchLLMScheduler(SimpleNamespace(batchllm=False), None)) is stock
    assert type(BatchLLMScheduler(SimpleNamespace(batchllm=True), None)) is BatchLLMScheduler


def test_without_the_flag_an_engine_reports_nothing(stock_engine):
    from sglang_batchllm.frontend.report import get_report

    assert "batchllm_report" not in stock_engine.get_server_info()["internal_states"][0]
    with pytest.raises(ValueError, match="batchllm=True"):
        get_report(stock_engine)


def test_the_cpu_platform_steps_aside_for_an_accelerator(monkeypatch):
    import torch

    from sglang_batchllm import platform, plugin

    monkeypatch.setattr(plugin, "load_early", lambda: None)
    assert platform.activate() == "sglang_batchllm.platform.cpu.CpuReferencePlatform"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert platform.activate() is None


def test_runtime_knows_the_flag(tiny_model):
    """sgl.Runtime starts a server in a process of its own."""
    import requests
    import sglang

    runtime = sglang.Runtime(
        model_path=str(tiny_model), batchllm=True, dtype="float32", max_total_tokens=4096
    )
    try:
        body = {"input_ids": [[5, 6, 7], [5, 6, 8]], "sampling_params": {"max_new_tokens": 2}}
        assert len(requests.post(runtime.url + "/generate", json=body, timeout=60).json()) == 2
        report = requests.get(runtime.url + "/batchllm/report", timeout=60).json()
        assert report["batches"][-1]["computed_tokens"] == 4

        def program(s, number):
            s += f"number {number}" + sglang.gen("answer", max_tokens=2)

        rows = [{"number": i} for i in range(5)]
        states = sglang.function(program).run_batch(rows, backend=runtime)
        assert all(state["answer"] is not None for state in states)
        report = requests.get(runtime.url + "/batchllm/report", timeout=60).json()
        assert (report["batches"][-1]["kind"], report["batches"][-1]["requests"]) == ("batch", 5)
    finally:
        runtime.shutdown()
