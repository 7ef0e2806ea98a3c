"""What attention reads of the server's settings."""

from __future__ import annotations

from typing import Any


def prefill_backend(model_runner: Any) -> str | None:
    """The name of the prefill attention backend that SGLang has chosen."""
    return model_runner.server_args.get_attention_backends()[0]
