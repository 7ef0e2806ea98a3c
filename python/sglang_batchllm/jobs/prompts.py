"""Prompts of rows as token ids, to plan by.

What the engine computes it tokenizes itself. Here a prompt's ids only say which prompts begin
alike, and how long they are: where there is no tokenizer, the bytes of its text do as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import orjson

from sglang_batchllm.jobs.rows import Row
from sglang_batchllm.wire.lines import CHAT


class Reader(Protocol):
    unit: str
    """What a prompt is measured in: "tokens" or "bytes"."""

    def read(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """The prompt of each row, int32[at least 1]."""
        ...

    def text(self, ids: np.ndarray) -> str:
        """What such ids stand for."""
        ...


class ByteReader:
    """Four bytes an id."""

    unit = "bytes"

    def read(self, rows: Sequence[Row]) -> list[np.ndarray]:
        return [_as_ids(_plain_text(row).encode(errors="replace")) for row in rows]

    def text(self, ids: np.ndarray) -> str:
        return ids.astype(np.int32).tobytes().decode(errors="replace").rstrip("\0")


class TokenReader:
    """With the model's tokenizer and chat template."""

    unit = "tokens"

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._refuses_template = not tokenizer.chat_template

    def read(self, rows: Sequence[Row]) -> list[np.ndarray]:
        prompts: list[Any] = [self._prompt(row) for row in rows]
        for special in (False, True):
            at = [i for i, (_, own) in enumerate(prompts) if own is special]
            for i, ids in zip(at, self._encode([prompts[i][0] for i in at], special), strict=True):
                prompts[i] = (np.array(ids or [0], np.int32), None)
        return [_as_ids(prompt) if own is None else prompt for prompt, own in prompts]

    def text(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist())

    def _prompt(self, row: Row) -> tuple[Any, bool | None]:
        """A text, and whether the tokenizer adds its special tokens to it; or ids, and None."""
        if row.url == CHAT:
            return self._rendered(row), False
        prompt = _first(row.body["prompt"])
        return (prompt, True) if isinstance(prompt, str) else (prompt, None)

    def _rendered(self, row: Row) -> str:
        options = row.body.get("chat_template_kwargs")
        if not isinstance(options, dict):
            options = {}
        # A template of the request's own is not run here.
        if not self._refuses_template and "chat_template" not in options:
            try:
                return self._tokenizer.apply_chat_template(
                    [_flat(message) for message in row.body["messages"]],
                    tokenize=False,
                    add_generation_prompt=True,
                    tools=row.body.get("tools"),
                    **options,
                )
            except Exception:  # whatever a template raises; the server will say what of it
                pass
        return _plain_text(row)

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts, add_special_tokens=special, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"]


def load_reader(tokenizer: str | None, trust_remote_code: bool = False) -> Reader:
    """tokenizer: a folder, or a name in the Hugging Face cache or hub; where it can't be loaded, or
    there is none, prompts are read as bytes."""
    if tokenizer is None:
        return ByteReader()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes read side by side
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError):
        return ByteReader()
    return TokenReader(loaded)


def _plain_text(row: Row) -> str:
    if row.url == CHAT:
        return orjson.dumps(row.body["messages"]).decode()
    prompt = _first(row.body["prompt"])
    return prompt if isinstance(prompt, str) else orjson.dumps(prompt).decode()


def _first(prompt: Any) -> Any:
    """Of several prompts in a row, the one that stands for it: a text or a list of ids."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return prompt[0]
    return prompt


def _flat(message: Any) -> Any:
    """Text parts as a text, which every template takes."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") or "" for part in content if isinstance(part, dict)]
        return {**message, "content": "\n".join(parts)}
    return message


def _as_ids(values: Any) -> np.ndarray:
    """int32[at least 1] of bytes or of whole numbers; what is neither stands for itself as 0."""
    if isinstance(values, bytes):
        ids = np.frombuffer(values + bytes(-len(values) % 4), np.int32)
    else:
        try:
            ids = np.asarray(values, np.int32).reshape(-1)
        except (OverflowError, TypeError, ValueError):
            ids = np.zeros(1, np.int32)
    return ids if ids.size else np.zeros(1, np.int32)
