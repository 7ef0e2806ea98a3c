"""What SGLang asks a platform for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.platforms.interface import SRTPlatform


class PlatformParts(SRTPlatform):
    """Nothing: SGLang's own pools and allocators run on a CPU."""


HOOKS: dict[str, Callable[..., Any]] = {}
"""What is wrapped while this platform is on; `plugin.py` does it."""
