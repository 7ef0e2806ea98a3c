"""An engine in this process that is made up: its answers say what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from sglang_batchllm.client.exchange import register_in_process
from sglang_batchllm.wire.lines import Reply, answer_line
from sglang_batchllm.wire.paths import RUN_PATH


class PretendedEngine:
    """handed_over: lists of programs as their requests came, by hand-over. direct: texts of
    requests that came by themselves. ended: what it was told of programs that have ended."""

    def __init__(self) -> None:
        self.handed_over: list[list[int]] = []
        self.direct: list[str] = []
        self.ended: dict[int, bool] = {}
        self.aborted = 0
        self._told = threading.Condition()

    def backend(self) -> RuntimeEndpoint:
        return RuntimeEndpoint(register_in_process(self), chat_template_name="chatml")

    def request(self, path: str, body: dict[str, Any] | None, stream: bool) -> Reply:
        if path == RUN_PATH:
            return Reply(200, {"max_running_requests": 64})
        if body is None:
            return Reply(200, {"model_path": "pretended"})
        self.direct.append(body["text"])
        return Reply(200, _answer(body))

    def hand_over(self, batch: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
        lines = [json.loads(line) for line in b"".join(chunks).splitlines()]
        self.handed_over.append([line["program"] for line in lines])
        going_on = {line["program"] for line in lines if line["more"]}
        yield b"\n"
        answered: list[int] = []
        try:
            for index, line in enumerate(lines):
                yield answer_line(index, 200, _answer(line["request"]))
                answered.append(line["program"])
                self._wait(going_on.intersection(answered), 8)  # as if no more fitted
            while not self._wait(going_on, 1):
                yield b"\n"
        finally:
            self.aborted += len(lines) - len(answered)

    def _wait(self, programs: set[int], fewer: int) -> bool:
        """Until fewer of these programs go on, but not for long."""
        with self._told:
            return self._told.wait_for(lambda: len(programs - set(self.ended)) < fewer, timeout=0.2)

    def end_programs(self, batch: str, programs: dict[int, bool]) -> None:
        with self._told:
            self.ended |= programs
            self._told.notify_all()


def _answer(body: dict[str, Any]) -> dict[str, Any]:
    return {"text": f"<{body['text']}>", "meta_info": {"prompt_tokens": 1, "cached_tokens": 0}}
