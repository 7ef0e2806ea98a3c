"""What a client of the API is told when something is refused."""

from __future__ import annotations

from starlette.responses import JSONResponse

_KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 507: "server_error"}


class ApiError(Exception):
    """A request that is refused; OpenAI's client raises it with this status and message.

    param: the parameter that is wrong. code: for programs, where a status says too little.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def response(self) -> JSONResponse:
        error = {
            "message": self.message,
            "type": _KINDS.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return JSONResponse({"error": error}, self.status)


def shown(value: object, most: int = 80) -> str:
    """What a client sent, or what was raised, short and safe to repeat to it."""
    text = repr(value).encode(errors="replace").decode()
    return text if len(text) <= most else f"{text[: most - 3]}..."
