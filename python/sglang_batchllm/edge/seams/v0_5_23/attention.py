"""What attention reads of the server's settings."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.model_override_base import attention_backends_of, resolving_view


def prefill_backend(model_runner: Any) -> str | None:
    """The name of the prefill attention backend that SGLang has chosen."""
    return attention_backends_of(resolving_view(model_runner.server_args))[0]
