"""Records of an output file, in OpenAI's batch format: one for each row, whatever came of it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import orjson

from sglang_batchllm.jobs.errors import RowError

BEGINNING = b'{"id":"batch_req_'
"""Of every record."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server says to a request. content: the decoded body."""

    status: int
    content: Any


def answer_record(custom_id: str, answer: Answer) -> bytes:
    """Of a request that the server answered, with whatever status."""
    body = answer.content
    request_id = body.get("id") if isinstance(body, dict) else None
    response = {"status_code": answer.status, "request_id": request_id or "", "body": body}
    return _record(custom_id, response, None)


def error_record(line: int, error: RowError, file: str | None = None) -> bytes:
    """Of a row that has no answer. line: from 1. file: where there are several."""
    about = {"code": error.code, "message": str(error), "line": line}
    if file is not None:
        about["file"] = file
    return _record(error.custom_id, None, about)


def _record(custom_id: str | None, response: Any, error: Any) -> bytes:
    record = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return orjson.dumps(record, option=orjson.OPT_NON_STR_KEYS) + b"\n"


def usage_of(body: Any) -> dict[str, Any]:
    """Tokens, of an answer that says how many."""
    usage = body.get("usage") if isinstance(body, dict) else None
    return usage if isinstance(usage, dict) else {}


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a record says of its row: by its line where it has one, else by its custom_id."""

    custom_id: str | None
    place: tuple[str | None, int] | None
    ok: bool
    output_tokens: int


def read_record(line: bytes) -> Recorded:
    """Raises ValueError for what is no line of `answer_record` or `error_record`."""
    record = orjson.loads(line)
    try:
        response, error = record["response"], record["error"]
        custom_id = record["custom_id"]
        place = (error.get("file"), int(error["line"])) if error else None
        usage = usage_of(response["body"]) if response else {}
        return Recorded(
            custom_id,
            place,
            ok=response is not None and response["status_code"] == 200,
            output_tokens=usage.get("completion_tokens") or 0,
        )
    except (AttributeError, KeyError, TypeError):
        raise ValueError("not a record of a batch") from None
