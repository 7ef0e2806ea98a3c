"""Reading what a client wants of a batch."""

from __future__ import annotations

import json
import re
from typing import Any

from sglang_batchllm.jobs.rows import URLS
from sglang_batchllm.server.batches.batch_store import Order
from sglang_batchllm.server.batches.errors import ApiError, shown
from sglang_batchllm.server.batches.life import read_seconds

MAX_BYTES = 1 << 20
"""Of the body: metadata is at most 16 times 576 characters."""

MAX_HOURS = 720

_KNOWN = {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
_HOURS = re.compile(r"([1-9]\d{0,2})h")


def read_order(data: bytes) -> Order:
    """Of the body of ``POST /v1/batches``. Raises ApiError (400)."""
    try:
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False).encode()  # half characters could not be given back
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is an object of input_file_id, endpoint, completion_window")
    unknown = sorted(set(body) - _KNOWN)
    if unknown:
        raise ApiError(400, f"there is no parameter {shown(unknown[0])}", param=unknown[0][:64])
    endpoint = _text(body, "endpoint")
    if endpoint not in URLS:
        raise ApiError(
            400, f"endpoint is {shown(endpoint)}; it is {' or '.join(URLS)}", param="endpoint"
        )
    window = _text(body, "completion_window")
    hours = _HOURS.fullmatch(window)
    if hours is None or int(hours[1]) > MAX_HOURS:
        raise ApiError(
            400,
            f"completion_window is {shown(window)}; it is a number of hours from 1h to "
            f"{MAX_HOURS}h, such as 24h",
            param="completion_window",
        )
    life = body.get("output_expires_after")
    return Order(
        _text(body, "input_file_id"),
        endpoint,
        int(hours[1]),
        _read_metadata(body.get("metadata")),
        None if life is None else read_seconds(life, "output_expires_after"),
    )


def _text(body: dict[str, Any], name: str) -> str:
    if name not in body:
        raise ApiError(400, f"{name} is missing", param=name)
    if not isinstance(body[name], str):
        raise ApiError(400, f"{name} is a string", param=name)
    return body[name]


def _read_metadata(metadata: Any) -> dict[str, str] | None:
    if metadata is None:
        return None
    if not isinstance(metadata, dict) or len(metadata) > 16:
        raise ApiError(400, "metadata is an object of at most 16 keys", param="metadata")
    for key, value in metadata.items():
        if len(key) > 64:
            raise ApiError(
                400,
                f"the key {shown(key)} of metadata has more than 64 characters",
                param="metadata",
            )
        if not isinstance(value, str) or len(value) > 512:
            raise ApiError(
                400,
                f"metadata at {shown(key)} is a string of at most 512 characters",
                param="metadata",
            )
    return metadata
