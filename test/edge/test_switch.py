"""The flag: where it is heard, what it refuses, and that nothing happens without it."""

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from sglang_batchllm.edge import seams
from sglang_batchllm.edge.args import BatchLLMServerArgs, UnsupportedError, resolved
from tiny_models import make_model

_RUN_AS_OTHER_VERSION = """
import runpy, sys
import sglang_batchllm
sglang_batchllm.SGLANG_VERSIONS = ("0.0.1", "0.0.2")
sys.argv = ["launch_server", *sys.argv[1:]]
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
"""

_PLATFORM_AND_HOOKS = """
import sglang, sglang.lang.interpreter
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs
hooked = hasattr(sglang.lang.interpreter.run_program_batch, "__wrapped__")
print(type(current_platform).__name__, int(hooked), int(hasattr(ServerArgs, "batchllm")))
"""


@pytest.fixture(scope="module")
def other_platform(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package that offers SGLang a platform."""
    folder = tmp_path_factory.mktemp("other")
    info = folder / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.platforms]\nother = other:activate\n")
    named = "sglang.srt.platforms.cuda.CudaSRTPlatform"
    (folder / "other.py").write_text(f"def activate():\n    return {named!r}\n")
    return folder


@pytest.fixture(scope="module")
def commands(
    tiny_model: Path, other_platform: Path
) -> dict[str, Future[subprocess.CompletedProcess[str]]]:
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
        "torch": [
            *(python, "-c"),
            "import torch, sys; print(int('sglang_batchllm' in sys.modules),"
            " sum(name == 'sglang' or name.startswith('sglang.') for name in sys.modules))",
        ],
        "bench help": [python, "-m", "sglang.bench_one_batch_server", "--help"],
    }
    beside = {"PYTHONPATH": str(other_platform)}
    environments = {
        "cpu engine": {"SGLANG_USE_CPU_ENGINE": "1"},
        "beside another": beside,
        "another chosen": beside | {"SGLANG_PLATFORM": "other"},
        "ours chosen": beside | {"SGLANG_PLATFORM": "batchllm_cpu"},
        "only ours allowed": beside | {"SGLANG_PLUGINS": "batchllm, batchllm_cpu"},
        "not allowed": {"SGLANG_PLUGINS": "another"},
    }
    words |= {name: [python, "-c", _PLATFORM_AND_HOOKS] for name in environments}
    pool = ThreadPoolExecutor(2)
    return {
        name: pool.submit(
            subprocess.run,
            command,
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | environments.get(name, {}),
        )
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
    installed = version("sglang")
    assert last == (
        f"error: --batchllm needs SGLang 0.0.1 or 0.0.2, but SGLang {installed} is installed; "
        "run: pip install 'sglang==0.0.2'"
    )
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


def test_a_front_end_that_is_not_python_is_refused(tiny_model, monkeypatch):
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(UnsupportedError, match="does not support SGLANG_RUST_SERVER; unset it"):
        BatchLLMServerArgs(model_path=str(tiny_model), batchllm=True)


@pytest.fixture(scope="module")
def recurrent_model(tmp_path_factory) -> str:
    return str(make_model("Qwen3-Next", tmp_path_factory.mktemp("model"), 320, 2048))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mamba_radix_cache_strategy": "extra_buffer"}, "--mamba-radix-cache-strategy extra"),
        ({"page_size": 16}, "--page-size 16 for a model with Mamba or linear-attention state"),
        ({"chunked_prefill_size": -1}, "--chunked-prefill-size -1"),
        ({"enable_mixed_chunk": True}, "--enable-mixed-chunk"),
    ],
)
def test_what_recurrent_state_does_not_go_with(recurrent_model, options, named):
    with pytest.raises(UnsupportedError, match=named):
        decided(BatchLLMServerArgs(model_path=recurrent_model, batchllm=True, **options))


@pytest.mark.parametrize("asked", [False, True])
def test_recurrent_state_is_kept_without_buffers_and_steps_overlap(recurrent_model, asked):
    args = BatchLLMServerArgs(
        model_path=recurrent_model, batchllm=True, disable_overlap_schedule=asked
    )
    args = decided(args)
    assert args.mamba_radix_cache_strategy == "no_buffer"
    assert args.disable_overlap_schedule == asked


def decided(args: BatchLLMServerArgs) -> Any:
    """The arguments once SGLang has decided, which some releases do when they are made."""
    if hasattr(args, "resolve_once"):
        args.resolve_once()
    return resolved(args)


def test_models_without_state_overlap_and_have_pages(tiny_model):
    args = decided(BatchLLMServerArgs(model_path=str(tiny_model), batchllm=True, page_size=16))
    assert not args.disable_overlap_schedule
    assert args.page_size == 16


def test_arguments_without_the_flag_are_stock(tiny_model):
    args = decided(BatchLLMServerArgs(model_path=str(tiny_model), schedule_policy="lpm"))
    assert args.radix_cache_backend is None
    assert not args.batchllm


@pytest.mark.parametrize(("value", "warnings"), [(1.0, 0), (0.5, 1)])
def test_what_has_no_effect_is_named(tiny_model, caplog, value, warnings):
    caplog.set_level(logging.WARNING)  # an engine in this process may have raised it
    for batchllm in (False, True):
        BatchLLMServerArgs(
            model_path=str(tiny_model), batchllm=batchllm, schedule_conservativeness=value
        )
    assert caplog.text.count("--schedule-conservativeness") == warnings


@pytest.mark.parametrize(
    ("options", "largest"),
    [
        ({"batchllm": True}, 256),  # a full step runs eagerly
        ({"batchllm": True, "cuda_graph_backend_prefill": "tc_piecewise"}, 512),  # never so
        ({"batchllm": True, "cuda_graph_max_bs_prefill": 512}, 512),
        ({}, 512),
    ],
)
def test_prefill_graphs_reach_half_a_chunk_unless_told_otherwise(tiny_model, options, largest):
    args = BatchLLMServerArgs(model_path=str(tiny_model), chunked_prefill_size=512, **options)
    if "tc_piecewise" in options.values() and version("sglang") == "0.5.23":
        pytest.skip("this release compiles no prefill")
    prefill = decided(args).cuda_graph_config.prefill
    assert prefill.max_bs == max(prefill.bs) == largest


def test_without_the_flag_the_scheduler_is_stock(monkeypatch):
    from types import SimpleNamespace

    from sglang_batchllm.edge.scheduler import BatchLLMScheduler

    stock = seams.load("scheduler").QueueingScheduler.__base__
    monkeypatch.setattr(stock, "__init__", lambda self, *args: None)
    assert type(BatchLLMScheduler(SimpleNamespace(batchllm=False), None)) is stock
    assert type(BatchLLMScheduler(SimpleNamespace(batchllm=True), None)) is BatchLLMScheduler


def test_without_the_flag_an_engine_reports_nothing(stock_engine):
    from sglang_batchllm.client.get_report import get_report

    assert "batchllm_report" not in stock_engine.get_server_info()["internal_states"][0]
    with pytest.raises(ValueError, match="batchllm=True"):
        get_report(stock_engine)


def test_the_cpu_platform_is_the_last_choice(monkeypatch):
    import torch

    from sglang_batchllm.edge import platform

    for name in ("SGLANG_PLATFORM", "SGLANG_PLUGINS", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    assert platform.activate() == platform.PLATFORM
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        assert platform.activate() is None
    with monkeypatch.context() as patch:
        patch.setenv("SGLANG_USE_CPU_ENGINE", "1")
        assert platform.activate() is None
    monkeypatch.setattr("sglang_batchllm.SGLANG_VERSIONS", ("0.0.1",))
    assert platform.activate() is None


def test_importing_torch_imports_nothing_of_sglangs(commands):
    result = commands["torch"].result()
    assert result.stdout.splitlines() == ["1 0"], result.stderr


def test_a_script_that_parses_sglangs_arguments_knows_the_flag(commands):
    result = commands["bench help"].result()
    assert "--batchllm-gather-ms" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("name", "platform"),
    [
        ("cpu engine", "CpuSRTPlatform"),
        ("beside another", "CudaSRTPlatform"),
        ("another chosen", "CudaSRTPlatform"),
        ("ours chosen", "CpuReferencePlatform"),
        ("only ours allowed", "CpuReferencePlatform"),
    ],
)
def test_any_other_platform_wins_and_the_flag_is_heard(commands, name, platform):
    result = commands[name].result()
    assert result.stdout.splitlines()[-1:] == [f"{platform} 1 1"], result.stderr


def test_a_plugin_left_out_of_sglangs_list_does_nothing(commands):
    result = commands["not allowed"].result()
    assert result.stdout.splitlines()[-1:] == ["SRTPlatform 0 0"], result.stderr


def test_hooks_say_where_they_are_from():
    from sglang.srt.plugins.hook_registry import HookRegistry

    ours = {
        target: source
        for target, hooks in HookRegistry._hooks.items()
        for _, hook, source in hooks
        if hook.__module__.startswith("sglang_batchllm.")
    }
    assert ours
    assert {source and source.plugin_name for source in ours.values()} == {"batchllm"}


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
        # A late answer to one of the Runtime's own questions may have come last.
        ran = [(batch["requests"], batch["computed_tokens"]) for batch in report["batches"]]
        assert (2, 4) in ran

        def program(s, number):
            s += f"number {number}" + sglang.gen("answer", max_tokens=2)

        rows = [{"number": i} for i in range(5)]
        states = sglang.function(program).run_batch(rows, backend=runtime)
        assert all(state["answer"] is not None for state in states)
        report = requests.get(runtime.url + "/batchllm/report", timeout=60).json()
        assert 5 in [batch["requests"] for batch in report["batches"]]
    finally:
        runtime.shutdown()


@pytest.mark.parametrize(
    ("kind", "config", "named"),
    [
        (
            "mellum",
            {
                "architectures": ["MellumForCausalLM"],
                "num_hidden_layers": 2,
                "sliding_window": 24,
                "layer_types": ["sliding_attention"] * 2,
            },
            "every layer has a sliding window",
        ),
    ],
)
def test_unsupported_models_are_named(tiny_model, tmp_path, kind, config, named):
    from transformers import AutoConfig

    AutoConfig.for_model(kind, **config).save_pretrained(tmp_path)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(UnsupportedError, match=named):
        decided(BatchLLMServerArgs(model_path=str(tmp_path), batchllm=True))
