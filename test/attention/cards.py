"""Cards that are not there: kernels are compiled for them, and launches of them do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget

KIB = 1024
RESERVED = 1 * KIB
"""Shared memory that the driver keeps of each program."""
REGISTERS = 64 * KIB
"""Of a multiprocessor, on each of these cards."""


class Card(NamedTuple):
    """capability: as 80 for 8.0. per_program, per_multiprocessor: bytes of shared memory."""

    capability: int
    per_program: int
    per_multiprocessor: int


CARDS = {
    "A100": Card(80, 163 * KIB, 164 * KIB),
    "L4, L40S, RTX 4090": Card(89, 99 * KIB, 100 * KIB),
    "H100, H200": Card(90, 227 * KIB, 228 * KIB),
    "B200": Card(100, 227 * KIB, 228 * KIB),
}


class Compiled(NamedTuple):
    """A kernel as it would be loaded. shared: bytes of a program."""

    shared: int
    registers: int | None  # at most, where it was asked for
    warps: int


class Driver:
    """Triton's view of the card, as far as it is needed to compile; `compiled` is by kernel's name.

    Triton itself refuses what needs more shared memory than a program of the card can have.
    """

    def __init__(self, card: Card) -> None:
        self._card = card
        self.compiled: dict[str, list[Compiled]] = {}
        self.utils = self

    def get_current_device(self) -> int:
        return self._card.capability  # what is compiled for one card is not taken for another's

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._card.capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._card.per_program}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        one = Compiled(metadata.shared, metadata.maxnreg, metadata.num_warps)
        self.compiled.setdefault(metadata.name, []).append(one)
        return lambda *args: None

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        module = function = registers = spilled = 0
        return module, function, registers, spilled, 1024

    def unload_module(self, module: int) -> None:
        pass
