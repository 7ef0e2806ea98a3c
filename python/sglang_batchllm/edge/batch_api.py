"""OpenAI's files and batches on SGLang's HTTP server."""

from __future__ import annotations

import sys
from typing import Any

from sglang.srt.entrypoints import http_server
from sglang.srt.managers.tokenizer_manager import ServerStatus

from sglang_batchllm.server.batches.api import add_batch_api
from sglang_batchllm.server.batches.directory import DirectoryError
from sglang_batchllm.server.batches.supervisor import Phase


def add_batch_api_routes(server_args: Any) -> None:
    """Before the server is set up. The process ends with one sentence where files cannot be kept.

    server_args: a `BatchLLMServerArgs`.
    """
    try:
        add_batch_api(
            http_server.app,
            server_args.batchllm_files,
            server_args.url(),
            server_args.api_key,
            _verify(server_args),
            _phase,
        )
    except DirectoryError as error:
        sys.exit(f"error: --batchllm-files: {error}")


def _verify(server_args: Any) -> bool | str:
    """As SGLang calls its own server: by its authorities, or not at all, where the certificate may
    have signed itself."""
    return server_args.ssl_ca_certs or not server_args.ssl_certfile


def _phase() -> Phase:
    state: Any = http_server.get_global_state()  # None until the server is set up
    if state is None or state.tokenizer_manager.server_status == ServerStatus.Starting:
        return "starting"
    return "stopping" if state.tokenizer_manager.gracefully_exit else "serving"
