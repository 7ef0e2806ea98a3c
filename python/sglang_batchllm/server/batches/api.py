"""The batch API of a server: routes, store and worker put together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI

from sglang_batchllm.server.batches.batch_routes import add_batch_routes
from sglang_batchllm.server.batches.directory import Directory, temporary
from sglang_batchllm.server.batches.file_routes import add_file_routes
from sglang_batchllm.server.batches.store import Store
from sglang_batchllm.server.batches.supervisor import Phase, Supervisor
from sglang_batchllm.server.batches.task import Task

logger = logging.getLogger(__name__)


def add_batch_api(
    app: FastAPI,
    files: str | None,
    url: str,
    api_key: str | None,
    verify: bool | str,
    phase: Callable[[], Phase],
) -> None:
    """Before the server starts, so that its API key guards these routes too. Batches that were left
    go on once it serves. Raises DirectoryError for a directory that cannot be used.

    files: the directory that keeps everything, None for one that goes with the server. url,
    api_key, verify: how the worker calls the server, see `jobs.server.Server`. phase: what the
    server is doing.
    """
    if files is None:
        directory = temporary()
        logger.info(
            "Files and batches are kept in %s until the server ends; --batchllm-files DIR keeps "
            "them longer",
            directory.root,
        )
    else:
        directory = Directory(Path(files).absolute())
    directory.make()
    directory.claim_server()  # until the process ends
    store = Store(directory)
    store.tidy()
    log_level = logging.getLogger().getEffectiveLevel()
    task = Task(str(directory.root), url, api_key, verify, log_level)
    supervisor = Supervisor(store, task, phase)
    add_file_routes(app, store)
    add_batch_routes(app, store, supervisor.wake)
    supervisor.start()
