"""Prompts of rows as ids to plan by: every body gives some, and those that begin alike do too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_batchllm.jobs.prompts import ByteReader, Reader, load_reader
from sglang_batchllm.jobs.rows import Row
from sglang_batchllm.wire.lines import CHAT, COMPLETIONS
from tiny_model import train_tokenizer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "text", "type"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def chat(messages: Any, **body: Any) -> Row:
    return Row("x", CHAT, {"messages": messages, **body})


def completion(prompt: Any) -> Row:
    return Row("x", COMPLETIONS, {"prompt": prompt})


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, [Path.__doc__ or ""], 400)
    return folder


@pytest.fixture(scope="module")
def tokens(tokenizer_path: Path) -> Reader:
    reader = load_reader(str(tokenizer_path))
    assert reader.unit == "tokens"
    return reader


@given(st.lists(JSON, max_size=4), st.lists(JSON, max_size=4))
def test_any_body_has_a_prompt(tokens: Reader, chats: list[Any], completions: list[Any]):
    """What it is worth is for the server to say."""
    rows = [*map(chat, chats), *map(completion, completions)]
    for reader in (tokens, ByteReader()):
        prompts = reader.read(rows)
        assert len(prompts) == len(rows)
        assert all(prompt.dtype == np.int32 and prompt.size for prompt in prompts)
        assert all(prompt.ndim == 1 for prompt in prompts)


@given(JSON, JSON, JSON)
def test_any_argument_of_a_template_has_a_prompt(tokens: Reader, tools: Any, more: Any, text: Any):
    rows = [chat(user("a"), tools=tools, chat_template_kwargs=more), chat([{"content": text}])]
    assert all(prompt.size for prompt in tokens.read(rows))


def test_a_chat_goes_through_the_template(tokens: Reader):
    messages = [{"role": "system", "content": "be"}, *user("hello")]
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    (plain, flat) = tokens.read([chat(messages), chat([{"role": "user", "content": parts}])])
    assert tokens.text(plain) == "system: be\nuser: hello\nassistant:"
    assert tokens.text(flat) == "user: hel\nlo\nassistant:"


def test_prompts_are_those_of_the_tokenizer(tokens: Reader, tokenizer_path: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    rows = [completion("a path"), chat(user("b")), completion(["c", "d"]), completion([5, 6])]
    rows += [completion([[7, 8], [9]])]
    found = [prompt.tolist() for prompt in tokens.read(rows)]
    rendered = tokenizer.apply_chat_template(user("b"), tokenize=False, add_generation_prompt=True)
    assert found == [
        tokenizer("a path")["input_ids"],
        tokenizer(rendered, add_special_tokens=False)["input_ids"],
        tokenizer("c")["input_ids"],
        [5, 6],
        [7, 8],
    ]


@pytest.mark.parametrize("prompt", ["", [], [[]], None, {}, 5, [1.5], [1 << 40], ["", 1], "\0"])
def test_what_is_no_prompt_still_has_ids(tokens: Reader, prompt: Any):
    for reader in (tokens, ByteReader()):
        (ids,) = reader.read([completion(prompt)])
        assert ids.dtype == np.int32 and ids.size


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_bytes_give_the_text_again(text: str):
    reader = ByteReader()
    (ids,) = reader.read([completion(text)])
    assert reader.text(ids) == text.rstrip("\0")


def test_texts_that_begin_alike_have_ids_that_do(tokens: Reader):
    rows = [completion("a path of the same beginning, " + end) for end in ("then this", "or that")]
    for reader in (tokens, ByteReader()):
        first, second = reader.read(rows)
        assert (first[:5] == second[:5]).all()
        assert first.tolist() != second.tolist()


@pytest.mark.parametrize("name", [None, "missing", "."])
def test_without_a_tokenizer_bytes_do(name: str | None, tmp_path: Path):
    path = None if name is None else str(tmp_path / name)
    assert load_reader(path).unit == "bytes"


def test_a_template_of_the_requests_own_is_not_run(tokens: Reader):
    bombs: list[Any] = [{"chat_template": "{{ 1 // 0 }}{{ range(10 ** 9) | list }}"}, "text", [1]]
    rows = [chat(user("Hello"), chat_template_kwargs=options) for options in bombs]
    assert all("Hello" in tokens.text(ids) for ids in tokens.read(rows))
