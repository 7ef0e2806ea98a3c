"""SGLang's process between front end and replicas, which is to pass a replica's list on whole."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from sglang.srt.managers.io_struct import BatchTokenizedGenerateReqInput, sock_send
from sglang.utils import TypeBasedDispatcher

from sglang_batchllm.edge.messages import NameTurns
from sglang_batchllm.edge.packing import PackedList

logger = logging.getLogger(__name__)


def know_lists(
    prepare: Callable[[], None], init_dispatcher: Callable[[Any], None], controller: Any
) -> None:
    """Around `DataParallelController.init_dispatcher`. What it does not know goes to all. prepare:
    has the process understand our messages."""
    init_dispatcher(controller)
    if not getattr(controller.server_args, "batchllm", False):
        return

    def name_turns(message: NameTurns) -> None:
        assert message.replica is not None
        sock_send(controller.workers[message.replica], message)

    def pass_on(message: PackedList) -> None:
        assert message.shard is not None
        sock_send(controller.workers[message.shard.replica], message)

    prepare()
    threading.Thread(
        target=_end_with_the_first, args=[controller.scheduler_procs], daemon=True
    ).start()
    controller._request_dispatcher += TypeBasedDispatcher(
        [(NameTurns, name_turns), (PackedList, pass_on)]
    )


def _end_with_the_first(schedulers: Sequence[BaseProcess]) -> None:
    """End this process, for which SGLang ends the server, when a replica has died: SGLang watches
    this process alone, and what the replica had would never be answered."""
    if schedulers:
        wait([scheduler.sentinel for scheduler in schedulers])
        logger.error("batchllm: a replica has died, so the server ends")
        os._exit(1)


def pass_on_list(
    dispatch: Callable[..., None], controller: Any, batch: BatchTokenizedGenerateReqInput
) -> None:
    """Around `DataParallelController.dispatch_batch_generate`, which sends one by one."""
    replicas = {request.routed_dp_rank for request in batch}
    replica = replicas.pop() if len(replicas) == 1 else None
    if replica is None or not getattr(controller.server_args, "batchllm", False):
        dispatch(controller, batch)
    else:
        sock_send(controller.workers[replica], batch)
