"""The batch report, as JSON, from an engine or a server."""

from __future__ import annotations

import json
import urllib.request
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

REPORT_PATH = "/batchllm/report"


def get_report(source: Engine | str, api_key: str | None = None) -> dict[str, Any]:
    """The report of an in-process engine, or of the server at a base URL.

    Returns ``{"batches": [...], "running": [...]}``; see `runtime.report.BatchReport` for the
    fields. Raises ValueError when the engine runs without ``batchllm``, and urllib's HTTPError
    when the server answers with an error (401 without the right `api_key`, 404 without
    ``--batchllm``).
    """
    if isinstance(source, str):
        request = urllib.request.Request(source.rstrip("/") + REPORT_PATH)
        if api_key is not None:
            request.add_header("Authorization", f"Bearer {api_key}")
        with urllib.request.urlopen(request) as response:
            return json.load(response)
    return _from_states(source.get_server_info()["internal_states"])


def add_report_route(server_args: ServerArgs, *_: Any, **__: Any) -> None:
    """Runs before SGLang sets its HTTP server up, so that the API key guards the route too."""
    if not getattr(server_args, "batchllm", False):
        return
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    async def report() -> dict[str, Any]:
        manager = http_server.get_global_state().tokenizer_manager
        assert isinstance(manager, TokenizerManager)
        return _from_states(await manager.get_internal_state())

    http_server.app.add_api_route(REPORT_PATH, report, methods=["GET"])


def _from_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    if "batchllm_report" not in states[0]:
        raise ValueError("no batch report: the engine runs without batchllm=True")
    return states[0]["batchllm_report"]
