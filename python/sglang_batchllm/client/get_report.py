"""The batch report, as JSON, from an engine or a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import requests

from sglang_batchllm.client.exchange import in_process_server
from sglang_batchllm.policy.shards import merged
from sglang_batchllm.wire.paths import REPORT_PATH

if TYPE_CHECKING:
    from sglang.lang.backend.runtime_endpoint import Runtime

SECONDS = 60
"""How long a server may take to answer; it does so between two of its steps."""


class Describes(Protocol):
    """What `sgl.Engine` and `sgl.RuntimeEndpoint` have in common."""

    def get_server_info(self) -> dict[str, Any]: ...


def get_report(source: str | Runtime | Describes, api_key: str | None = None) -> dict[str, Any]:
    """The report of a server or an engine, as `policy.report` describes it.

    source: the base URL of a server, a `sgl.RuntimeEndpoint`, a `sgl.Runtime`, or a `sgl.Engine`.
    api_key: of the server; None takes that of the endpoint.

    Raises ValueError where it runs without ``batchllm``, PermissionError without the right key,
    ConnectionError when no server answers, RuntimeError for any other answer of it, and TypeError
    for other sources.
    """
    if isinstance(source, str):
        return _fetch(source, api_key, True)
    from sglang.lang.backend.runtime_endpoint import Runtime, RuntimeEndpoint

    if isinstance(source, Runtime):
        source = source.endpoint
    if isinstance(source, RuntimeEndpoint) and in_process_server(source.base_url) is None:
        key = source.api_key if api_key is None else api_key
        return _fetch(source.base_url, key, source.verify or True)
    if not hasattr(source, "get_server_info"):
        raise TypeError(
            "get_report takes the URL of a server, a sgl.RuntimeEndpoint, a sgl.Runtime or a "
            f"sgl.Engine, and not {source!r}"
        )
    return report_in(source.get_server_info()["internal_states"])


def report_in(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The report among the internal states of SGLang's schedulers, one of each replica."""
    if "batchllm_report" not in states[0]:
        raise ValueError("no batch report: the engine runs without batchllm=True")
    reports = [state["batchllm_report"] for state in states]
    return reports[0] if len(reports) == 1 else merged(reports)


def _fetch(url: str, api_key: str | None, verify: bool | str) -> dict[str, Any]:
    """verify: whether to check the server's certificate, or the file to check it with."""

    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        response = requests.get(
            url.rstrip("/") + REPORT_PATH, headers=headers, timeout=SECONDS, verify=verify
        )
    except (requests.ConnectionError, requests.Timeout) as error:
        raise ConnectionError(f"no batch report: no server answers at {url} ({error})") from None
    if response.status_code == 404:
        raise ValueError(f"no batch report: the server at {url} runs without --batchllm")
    if response.status_code in (401, 403):
        raise PermissionError(
            f"no batch report: the server at {url} refuses this API key; pass its key as api_key"
        )
    if response.status_code != 200:
        raise RuntimeError(
            f"no batch report: the server at {url} answers {response.status_code}: {response.text}"
        )
    return response.json()
