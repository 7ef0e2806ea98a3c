"""Rows of a batch file: a line of JSON each, in OpenAI's batch format."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from sglang_batchllm.jobs.errors import RowError
from sglang_batchllm.wire.lines import CHAT, COMPLETIONS, MAX_LINE_BYTES

URLS = (CHAT, COMPLETIONS)

MAX_ROW_BYTES = MAX_LINE_BYTES - 1024
"""A server takes lines of `MAX_LINE_BYTES`, which say a little more than a row's body."""

MAX_DEPTH = 250
"""Of a row's JSON: as much as orjson writes again, less what is put around it."""

_PROMPT = {CHAT: "messages", COMPLETIONS: "prompt"}


@dataclass(frozen=True, slots=True)
class Row:
    """One request. body: as the endpoint takes it, with the job's own parameters filled in."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Rules:
    """What rows may ask for. models: names that are served, None where that is
    not known. urls: of `URLS`.
    params: what a body has where it says nothing itself."""

    models: Collection[str] | None = None
    urls: Collection[str] = URLS
    params: Mapping[str, Any] = field(default_factory=dict)

    def read(self, line: bytes) -> Row:
        """The row in a line of a file. Raises RowError."""
        entry = _decoded(line)
        custom_id = entry.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            raise RowError("invalid_request", _custom_id_complaint(entry))
        try:
            return Row(custom_id, self._url(entry), self._body(entry))
        except RowError as error:
            error.custom_id = custom_id
            raise

    def _url(self, entry: dict[str, Any]) -> str:
        method, url = entry.get("method", "POST"), str(entry.get("url"))
        if method != "POST":
            raise RowError("invalid_method", f"method is {_shown(method)}; it must be POST")
        if url not in self.urls:
            raise RowError(
                "invalid_url", f"url is {_shown(entry.get('url'))}; it must be {_or(self.urls)}"
            )
        return url

    def _body(self, entry: dict[str, Any]) -> dict[str, Any]:
        body = entry.get("body")
        if not isinstance(body, dict):
            raise RowError("invalid_request", f"body is {_shown(body)}; it must be an object")
        body = {**self.params, **body}
        needed = _PROMPT[entry["url"]]
        if needed not in body:
            raise RowError("invalid_request", f"body has no {needed}, which {entry['url']} needs")
        if body.pop("stream", False):
            raise RowError("invalid_request", "body has stream; a batch has whole answers only")
        body.pop("stream_options", None)
        model = body.get("model")
        if model is None and self.models:
            body["model"] = next(iter(self.models))
        elif model is None and self.models is None:
            pass  # whoever runs it fills it in
        elif not isinstance(model, str):
            raise RowError("invalid_model", f"body.model is {_shown(model)}; name a model")
        elif self.models is not None and not {model, model.partition(":")[0]} & {*self.models}:
            raise RowError(
                "invalid_model", f"model is {_shown(model)}; served is {_or(self.models)}"
            )
        return body


def _decoded(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_ROW_BYTES:
        raise too_long(len(line))
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise RowError(
            "invalid_encoding", f"the line is not UTF-8 from byte {error.start + 1} on"
        ) from None
    try:
        entry = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RowError("invalid_json", f"the line is not JSON: {error}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(entry):
        raise RowError("invalid_json", f"the line is nested more than {MAX_DEPTH} deep")
    if not isinstance(entry, dict):
        raise RowError(
            "invalid_request",
            f"the line is {_shown(entry)}; it must be an object with custom_id, method, url, body",
        )
    return entry


def _is_deep(entry: object) -> bool:
    try:
        orjson.dumps([[[[entry]]]])  # it writes 254 levels
    except TypeError:
        return True
    return False


def too_long(num_bytes: int) -> RowError:
    return RowError(
        "too_long", f"the line has {num_bytes} bytes; a request has at most {MAX_ROW_BYTES}"
    )


def _custom_id_complaint(entry: dict[str, Any]) -> str:
    if "custom_id" not in entry:
        return "custom_id is missing; give each request one of its own"
    return f"custom_id is {_shown(entry['custom_id'])}; it must be a text that is not empty"


def _shown(value: object) -> str:
    """Short enough for a message."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = orjson.dumps(value).decode()
    return text if len(text) <= 80 else f"{text[:80]}..."


def _or(names: Collection[str]) -> str:
    return " or ".join(names)
