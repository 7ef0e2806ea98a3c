"""The CPU reference platform, and the entry point by which SGLang discovers it."""

import importlib.metadata

import torch

from sglang_batchllm import SGLANG_VERSION


def activate() -> str | None:
    """Return the platform class for SGLang to load, or None to leave the choice to SGLang.

    SGLang calls this in every process, while ``import sglang`` is still under way, so nothing of
    SGLang may be imported here. The CPU platform is offered only where torch sees no accelerator
    at all and SGLang is the release that it was written against.
    """
    if importlib.metadata.version("sglang") != SGLANG_VERSION:
        return None
    from sglang_batchllm import plugin

    plugin.load_early()
    if torch.accelerator.is_available():
        return None
    return "sglang_batchllm.platform.cpu.CpuReferencePlatform"
