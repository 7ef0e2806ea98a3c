"""The CPU reference platform, and the entry point by which SGLang discovers it."""

from __future__ import annotations

import importlib.metadata
import os

import torch

from sglang_batchllm.edge import command_line, plugin

PLATFORM = "sglang_batchllm.edge.platform.cpu.CpuReferencePlatform"


def activate() -> str | None:
    """Return the platform class for SGLang to load, or None to leave the choice to SGLang.

    SGLang calls this in every process, while ``import sglang`` is still under way, so nothing of
    SGLang may be imported here. Ours is the last choice: only where torch sees no accelerator, no
    other platform is installed, SGLang's own CPU engine is not asked for, and SGLang is the release
    that it was written against. SGLANG_PLATFORM=batchllm_cpu chooses it beside other platforms.
    """
    plugin.register()
    if command_line.version_refusal() is not None or torch.accelerator.is_available():
        return None
    if os.environ.get("SGLANG_PLATFORM"):
        return PLATFORM  # SGLang asks only the platform that is named
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or _others():
        return None
    return PLATFORM


def _others() -> bool:
    """Whether SGLang asks another platform, too; it refuses to start where two offer themselves."""
    chosen = os.environ.get("SGLANG_PLUGINS")
    allowed = chosen and {name.strip() for name in chosen.split(",")}
    return any(
        entry.name != "batchllm_cpu" and (not allowed or entry.name in allowed)
        for entry in importlib.metadata.entry_points(group="sglang.srt.platforms")
    )
