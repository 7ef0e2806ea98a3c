"""One seam for all that a `sgl.RuntimeEndpoint` sends: SGLang's `http_request`.

A trace reads there what a program would send, a hand-over answers there what was sent before, and
an engine in this process answers there instead of a server. The backend that programs see stays
SGLang's own class, and so do the requests that it builds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from sglang_batchllm.wire.lines import Reply

if TYPE_CHECKING:
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
    from sglang.lang.interpreter import StreamExecutor


class Listener(Protocol):
    """Stands between a program and its server for ``POST /generate``."""

    def answer(self, body: dict[str, Any]) -> Reply | None:
        """The reply to a request, or None to send it. `body`: the request as SGLang built it."""
        ...

    def is_cached(self, text: str) -> bool:
        """Whether a request that only caches the KV of `text`, before a fork, is needless."""
        ...


class InProcessServer(Protocol):
    """Answers requests without a network."""

    def request(self, path: str, body: dict[str, Any] | None, stream: bool) -> Reply: ...

    def hand_over(self, batch: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """chunks: whole lines of `request_line`. Yields lines as `read_answers` takes them."""
        ...

    def end_programs(self, batch: str, programs: dict[int, bool]) -> None:
        """See `channel.Channel`."""
        ...


_listener: ContextVar[Listener | None] = ContextVar("batchllm_listener", default=None)
_in_process: WeakValueDictionary[str, InProcessServer] = WeakValueDictionary()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within it, `listener` is asked first, in the threads of SGLang's interpreter too."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def register_in_process(server: InProcessServer) -> str:
    """The base URL under which `server` is reached as long as it exists."""
    url = f"in-process:{id(server):x}"
    _in_process[url] = server
    return url


def in_process_server(base_url: str) -> InProcessServer | None:
    return _in_process.get(base_url)


def exchange(
    http_request: Callable[..., Any],
    url: str,
    json: dict[str, Any] | None = None,
    stream: bool = False,
    **options: Any,
) -> Any:
    """Wraps the `http_request` of SGLang's RuntimeEndpoint."""
    listener = _listener.get()
    if listener is not None and json is not None and not stream and url.endswith("/generate"):
        reply = listener.answer(json)
        if reply is not None:
            return reply
    base, _, path = url.partition("/")
    server = in_process_server(base)
    if server is not None:
        return server.request("/" + path, json, stream)
    return http_request(url, json=json, stream=stream, **options)


def cache_prefix(
    commit: Callable[..., None], endpoint: RuntimeEndpoint, executor: StreamExecutor
) -> None:
    """Wraps RuntimeEndpoint.commit_lazy_operations, which a program calls before it forks."""
    listener = _listener.get()
    if listener is None or executor.images_ or not listener.is_cached(executor.text_):
        commit(endpoint, executor)
