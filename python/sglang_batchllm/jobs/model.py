"""Which model it is that answers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from sglang_batchllm.jobs.server import About


def tokenizer_here(about: About) -> str | None:
    """Of a server that somebody else runs: where this machine has its tokenizer, if it has it."""
    path = about.tokenizer_path or about.model_path
    if Path(path).is_dir():
        return path
    try:
        found = try_to_load_from_cache(path, "tokenizer_config.json")
    except HFValidationError:
        return None
    return path if isinstance(found, str) else None


def model_identity(path: str) -> dict[str, Any]:
    """For `memory.Identity`. path: a folder, whose weights go by name and size, or a name."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return {"name": path, "files": None}
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.iterdir()):
        if file.name == "config.json":
            digest.update(file.read_bytes())
        elif file.suffix in (".safetensors", ".bin", ".gguf"):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return {"name": str(folder.resolve()), "files": digest.hexdigest()}
