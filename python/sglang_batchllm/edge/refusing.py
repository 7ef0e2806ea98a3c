"""What stands in for SGLang's arguments under a release that this package was not tested with."""

from __future__ import annotations

import dataclasses

from sglang.srt.server_args import ServerArgs

from sglang_batchllm.edge import command_line


class RefusingServerArgs(ServerArgs):
    """Knows ``batchllm`` only to refuse it."""

    batchllm: bool = False

    def __post_init__(self) -> None:
        if self.batchllm:
            raise ValueError(command_line.version_refusal())
        super().__post_init__()


if dataclasses.is_dataclass(ServerArgs):  # or a record of another kind, which needs no more
    RefusingServerArgs = dataclasses.dataclass(RefusingServerArgs)
