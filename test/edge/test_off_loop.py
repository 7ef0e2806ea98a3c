"""Where SGLang's handlers convert requests in the event loop, a hand-over has threads do it."""

import asyncio
import threading
import time
from typing import Any

from sglang_batchllm.edge.seams.v0_5_17.openai import convert_off_loop


class Handler:
    """refuses: what it says of every request. fails: converting does."""

    def __init__(self, refuses: str | None = None, fails: bool = False):
        self._refuses = refuses
        self._fails = fails
        self.threads: list[int] = []

    def _validate_request(self, request: str) -> str | None:
        return self._refuses

    def _convert_to_internal_request(self, request: str, raw_request: None) -> tuple[str, str]:
        self.threads.append(threading.get_ident())
        time.sleep(0.1)
        if self._fails:
            raise ValueError("no such template")
        return f"converted {request}", request


def test_others_run_meanwhile_and_it_is_done_once():
    handler: Any = Handler()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.001)

    async def main() -> Any:
        counting = asyncio.create_task(count())
        ready = await convert_off_loop(handler, "a", None)
        counting.cancel()
        return ready

    ready = asyncio.run(main())
    assert turns > 10
    assert ready._convert_to_internal_request("a", None) == ("converted a", "a")
    assert len(handler.threads) == 1 and handler.threads != [threading.get_ident()]
    assert handler._convert_to_internal_request("b", None) == ("converted b", "b"), "as it was"


def test_the_handler_answers_itself_what_is_refused_or_fails():
    for handler in (Handler(refuses="no messages"), Handler(fails=True)):
        assert asyncio.run(convert_off_loop(handler, "a", None)) is handler  # type: ignore[arg-type]
