"""What is said before SGLang is imported, and that nothing is said without a reason."""

import argparse
from pathlib import Path

import pytest

from sglang_batchllm.edge.args import BatchLLMServerArgs
from sglang_batchllm.edge.command_line import complaint, known_flags

LAUNCH = ["python", "-m", "sglang.launch_server", "--batchllm"]
SERVE = ["python", "/usr/bin/sglang", "serve"]


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("SGLANG_USE_MODELSCOPE", raising=False)


def test_every_flag_that_sglang_takes_is_known() -> None:
    parser = argparse.ArgumentParser()
    BatchLLMServerArgs.add_cli_args(parser)
    taken = {flag for action in parser._actions for flag in action.option_strings}
    taken -= {"-h", "--help", "-tp", "-dp", "-pp"}
    assert len(taken) > 300
    long = {flag for flag in taken if flag.startswith("--")}
    assert len(known_flags()) > 300
    long |= {"--metrics-port", "--metrics-host"}  # a plugin adds them that SGLang requires
    words = [word for flag in long for word in (flag, f"{flag}=1")]
    assert complaint([*LAUNCH, "--model-path", "org/model", *words]) is None
    assert "no flag --never" in str(
        complaint([*LAUNCH, "--model-path", "org/model", *words, "--never"])
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--batchllm-gather", "5"], None),  # the beginning of one
        (["--batchlm-gather-ms", "5"], "--batchlm-gather-ms; did you mean --batchllm-gather-ms?"),
        (["--maxtokens=5"], "--maxtokens; "),
        (["--maxtokens=5", "--help"], None),
    ],
)
def test_an_unknown_flag_is_named(words: list[str], named: str | None) -> None:
    said = complaint([*LAUNCH, "--model-path", "org/model", *words])
    assert said is None if named is None else said and f"no flag {named}" in said


def test_flags_of_other_plugins_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint
    from types import SimpleNamespace

    entry = EntryPoint("other", "other:register", "sglang.srt.plugins")
    vars(entry)["dist"] = SimpleNamespace(name="other")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry])
    assert complaint([*LAUNCH, "--model-path", "org/model", "--flag-of-other"]) is None


def test_a_model_that_is_not_there_is_named(tmp_path: Path, tiny_model: Path) -> None:
    def said(model: str, *command: str) -> str | None:
        return complaint([*(command or (*LAUNCH, "--model-path")), model])

    missing, empty = str(tmp_path / "missing"), str(tmp_path)
    for sentence in (
        said(missing),
        said(missing, *SERVE, "--batchllm", "--model"),
        complaint([*SERVE, missing, "--batchllm"]),
        complaint([*LAUNCH, f"--model-path={missing}"]),
    ):
        assert sentence is not None
        assert sentence.startswith(f"--model-path {missing} does not exist; ")
    assert f"--model-path {empty} has no config.json" in (said(empty) or "")
    (tmp_path / "model.gguf").touch()
    for fine in (str(tiny_model), str(tmp_path / "model.gguf"), "org/model", "s3://a/model"):
        assert said(fine) is None


def test_a_model_that_offline_use_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    command = [*LAUNCH, "--model-path", "org/model"]
    for model in ("org/model", "not a model"):
        assert "HF_HUB_OFFLINE is set" in (complaint([*LAUNCH, "--model-path", model]) or "")
    snapshot = tmp_path / "models--org--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    assert complaint(command) is None


def test_other_commands_are_left_alone(tmp_path: Path) -> None:
    bad = ["--model-path", str(tmp_path / "missing"), "--no-such-flag"]
    assert complaint(["python", "-m", "sglang.launch_server", *bad]) is None
    assert complaint(["python", "train.py", "--batchllm", *bad]) is None
    assert complaint([*SERVE, "--batchllm", *bad]) is not None
