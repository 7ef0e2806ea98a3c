"""Shared by all tests: the tiny model, and real engines and servers, each started once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from engines import (
    AMPLE,
    CONTEXT_LENGTH,
    MIXING,
    SCARCE,
    SERVER_PAGE_SIZE,
    VOCAB_SIZE,
    Server,
    abort_in_prefill,
    keep_no_rows,
    record_last_layer,
)
from steps import record_steps
from tiny_model import make_tiny_model

# Every engine checks that no KV slot is lost or counted twice, busy and idle.
os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "1"
os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE"] = "1"
os.environ["SGLANG_CHECK_KV_PAGE_INVARIANTS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is too small for more to pay

# Other examples in every run, in CI too, where hypothesis by itself would repeat the same ones; a
# failure prints what reproduces it. A machine may be slow, so no example has a deadline.
settings.register_profile(
    "explore",
    derandomize=False,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("explore")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    return make_tiny_model(folder, [Path.__doc__ or ""], VOCAB_SIZE, CONTEXT_LENGTH)


def _engine(model: Path, engine_class: Any = None, **options: Any) -> Iterator[Any]:
    """For the whole session: an engine that is shut down ends all that this process has started."""
    import sglang

    engine = (engine_class or sglang.Engine)(
        model_path=str(model), dtype="float32", sleep_on_idle=True, **options
    )
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def starting_server(tiny_model: Path) -> Iterator[Server]:
    """Starts beside the first engine, since most of a start is waiting for the disk."""
    server = Server(tiny_model, "--batchllm", "--page-size", str(SERVER_PAGE_SIZE))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def server(starting_server: Server) -> Server:
    starting_server.wait()
    return starting_server


@pytest.fixture(scope="session")
def engine(tiny_model: Path, starting_server: Server) -> Iterator[Any]:
    yield from _engine(tiny_model, batchllm=True, max_total_tokens=AMPLE)


@pytest.fixture(scope="session")
def aborted_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which requests of the scarce engine were aborted half-way through their prefill."""
    return tmp_path_factory.mktemp("aborted") / "aborted"


@pytest.fixture(scope="session")
def scarce_steps_file(aborted_file: Path) -> Path:
    """Where its forward steps are recorded."""
    return aborted_file.with_name("steps")


@pytest.fixture(scope="session")
def scarce_engine(tiny_model: Path, aborted_file: Path, scarce_steps_file: Path) -> Iterator[Any]:
    """KV for a few requests only, chunks shorter than most prompts, prefix-shared attention."""
    from sglang.srt.entrypoints.engine import Engine

    class AbortingEngine(Engine):
        pass

    abort_in_prefill(AbortingEngine, aborted_file)
    record_steps(AbortingEngine, scarce_steps_file)
    yield from _engine(
        tiny_model,
        AbortingEngine,
        batchllm=True,
        batchllm_attention="fused",
        max_total_tokens=SCARCE,
        chunked_prefill_size=48,
    )


@pytest.fixture(scope="session")
def steps_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the mixing engine's forward steps are recorded."""
    return tmp_path_factory.mktemp("steps") / "steps"


@pytest.fixture(scope="session")
def last_layer_file(steps_file: Path) -> Path:
    """Where the rows in the end of the mixing engine's last layer are recorded."""
    return steps_file.with_name("last_layer")


@pytest.fixture(scope="session")
def mixing_engine(tiny_model: Path, steps_file: Path, last_layer_file: Path) -> Iterator[Any]:
    """Some requests decode while others are prefilled, in one forward step."""
    from sglang.srt.entrypoints.engine import Engine

    class RecordedEngine(Engine):
        pass

    record_steps(RecordedEngine, steps_file)
    record_last_layer(RecordedEngine, last_layer_file)
    yield from _engine(
        tiny_model,
        RecordedEngine,
        batchllm=True,
        batchllm_attention="fused",
        max_total_tokens=MIXING,
        chunked_prefill_size=96,
        enable_mixed_chunk=True,
    )


@pytest.fixture(scope="session")
def forgetful_engine(tiny_model: Path) -> Iterator[Any]:
    """No memory for logprobs of shared tokens."""
    from sglang.srt.entrypoints.engine import Engine

    class Forgetful(Engine):
        pass

    keep_no_rows(Forgetful)
    yield from _engine(tiny_model, Forgetful, batchllm=True, max_total_tokens=AMPLE)


@pytest.fixture(scope="session")
def replicated_engine(tiny_model: Path) -> Iterator[Any]:
    """Two replicas. SGLang 0.5.23 wants to be told of a core for each on a CPU."""
    cores = sorted(os.sched_getaffinity(0))
    starting = _engine(tiny_model, batchllm=True, dp_size=2, max_total_tokens=AMPLE)
    with pytest.MonkeyPatch.context() as patch:
        if version("sglang") != "0.5.17":
            patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
        engine = next(starting)
    yield engine
    next(starting, None)


@pytest.fixture(scope="session")
def stock_engine(tiny_model: Path) -> Iterator[Any]:
    yield from _engine(tiny_model, max_total_tokens=AMPLE)
