"""What SGLang asks a platform for."""

from __future__ import annotations

from sglang.srt.platforms.interface import SRTPlatform


class PlatformParts(SRTPlatform):
    """Nothing: SGLang's own pool and allocator run on a CPU."""
