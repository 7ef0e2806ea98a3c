"""What a job that is resumed must know beside its records: a small file next to the output."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglang_batchllm.jobs.errors import JobError

VERSION = 1


@dataclass(frozen=True)
class Identity:
    """What must be the same for records to belong together.

    inputs: their paths, which may be others later. digest: of all their bytes. model: what answers.
    params: see `rows.Rules`.
    """

    inputs: list[str]
    digest: str
    model: dict[str, Any]
    params: dict[str, Any]

    def difference(self, other: Identity) -> str | None:
        """What is not the same in another, in words."""
        if self.digest != other.digest or len(self.inputs) != len(other.inputs):
            return "the input has changed since then"
        if self.model != other.model:
            return f"it was begun with model {_name(other.model)}, and this is {_name(self.model)}"
        if self.params != other.params:
            return f"it was begun with parameters {other.params}, and these are {self.params}"
        return None


def _name(model: Mapping[str, Any]) -> str:
    return " ".join(str(value) for value in model.values() if value)


@dataclass
class Memory:
    """The file. suspects: rows that were with an engine when it died, and how often. alone: how
    often of these times they were alone with it."""

    path: Path
    identity: Identity | None = None
    suspects: dict[int, int] = field(default_factory=dict)
    alone: dict[int, int] = field(default_factory=dict)

    @classmethod
    def beside(cls, output: Path) -> Memory:
        """Of the job that writes this output. Raises JobError where it can't be read."""
        memory = cls(output.with_name(output.name + ".batchllm"))
        try:
            known = json.loads(memory.path.read_bytes())
            if known["version"] != VERSION:
                raise ValueError
            memory.identity = Identity(**known["identity"])
            memory.suspects = {int(row): times for row, times in known["suspects"].items()}
            alone = known.get("alone", {})  # earlier versions did not say
            memory.alone = {int(row): times for row, times in alone.items()}
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError):
            raise JobError(
                f"{memory.path} is not what a run of this version leaves; name another output"
            ) from None
        return memory

    def check(self, identity: Identity, output: Path, has_records: bool) -> None:
        """Raises JobError where the output belongs to another job."""
        if self.identity is None and has_records:
            raise JobError(
                f"{output} has records, but none of a run like this; name another output"
            )
        difference = self.identity and identity.difference(self.identity)
        if difference and has_records:
            raise JobError(
                f"{output} belongs to another job: {difference}; name another output, or delete "
                f"{output} and {self.path}"
            )
        if difference:
            self.suspects, self.alone = {}, {}
        if difference or self.identity is None:
            self.identity = identity

    @property
    def names(self) -> list[str]:
        """Of the inputs, as records have them: as they were when the job was begun."""
        assert self.identity is not None
        return self.identity.inputs

    def save(self) -> None:
        """At once and whole."""
        assert self.identity is not None
        known = {
            "version": VERSION,
            "identity": asdict(self.identity),
            "suspects": self.suspects,
            "alone": self.alone,
        }
        new = self.path.with_name(self.path.name + ".new")
        with new.open("w") as stream:
            json.dump(known, stream)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(self.path)
