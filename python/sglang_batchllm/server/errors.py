"""How errors are answered."""

from __future__ import annotations

import logging
from http import HTTPStatus

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError

from sglang_batchllm.wire.lines import Reply

logger = logging.getLogger(__name__)

MAX_MESSAGE = 4096
"""Characters of a message at most: some repeat the request."""


class RefusedError(Exception):
    """A hand-over that can't be taken, with the status of the answer."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.reply = Reply(status, {"error": {"message": message}})


def error_reply(error: Exception) -> Reply:
    """How SGLang's HTTP server answers what its front end raises for a request."""
    if isinstance(error, HTTPException):
        status = error.status_code
        content = {"object": "error", "message": _text(error.detail), "type": str(status)}
        return Reply(status, content)
    if isinstance(error, RequestValidationError):
        kind = HTTPStatus.BAD_REQUEST
        message = _text(f"{error} {error.errors()}")
        content = {"object": "error", "message": message, "type": kind.phrase, "code": kind.value}
        return Reply(kind.value, content)
    if isinstance(error, ValueError):
        status = getattr(error, "status_code", HTTPStatus.BAD_REQUEST.value)
        return Reply(status, {"error": {"message": _text(error)}})
    logger.error("A request failed", exc_info=error)
    return Reply(500, {"error": {"message": _text(f"Internal Server Error: {error!r}")}})


def _text(message: object) -> str:
    """As text that is safe to send: whole characters, and not too many."""
    text = str(message).encode(errors="replace").decode()
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."
