"""The directory that holds everything: content, results in the making, and the database."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from sglang_batchllm.server.batches.ids import is_batch_id, is_file_id

_PREFIX = "sglang-batchllm-files-"
_NEW_SECONDS = 60


class DirectoryError(ValueError):
    """A directory that cannot be used, in one sentence that says what to do."""


class Directory:
    """Paths below one directory, of ids that were made here. Only this user may look inside."""

    def __init__(self, root: Path):
        self.root = root

    @property
    def database(self) -> Path:
        return self.root / "state.sqlite"

    @property
    def contents(self) -> Path:
        return self.root / "files"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def uploads(self) -> Path:
        return self.root / "uploads"

    def content(self, file_id: str) -> Path:
        """The content of a file."""
        assert is_file_id(file_id)
        return self.contents / file_id

    def upload(self, file_id: str) -> Path:
        """What has come so far of a file."""
        assert is_file_id(file_id)
        return self.uploads / file_id

    def run(self, batch_id: str) -> Path:
        """The folder in which a batch is worked off."""
        assert is_batch_id(batch_id)
        return self.runs / batch_id

    def make(self) -> None:
        """Raises DirectoryError for one that cannot be made or written to."""
        try:
            for folder in (self.root, self.contents, self.runs, self.uploads):
                folder.mkdir(mode=0o700, parents=folder is self.root, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as probe:
                probe.write(b"x")
        except OSError as error:
            raise DirectoryError(
                f"files cannot be kept in {self.root}: {error.strerror}; name a directory that "
                "can be written to."
            ) from None

    def claim(self, name: str) -> Lock | None:
        """The lock of this name, or None while another process has it."""
        descriptor = os.open(self.root / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return Lock(descriptor)

    def claim_server(self) -> Lock:
        """Two servers would run the same batches. Raises DirectoryError where another is there."""
        lock = self.claim("server")
        if lock is None:
            raise DirectoryError(
                f"another server keeps its files in {self.root}; name another directory, or stop "
                "that server."
            )
        return lock


class Lock:
    """Until it is released, or the process ends, however it ends. Children do not inherit it."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def release(self) -> None:
        os.close(self._descriptor)


def check(path: str) -> None:
    """Before a model is loaded: raises DirectoryError for what could not be used later."""
    directory = Directory(Path(path))
    directory.make()
    directory.claim_server().release()


def temporary() -> Directory:
    """A new directory for the life of this process. Those of processes that were killed are removed
    by the next one."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        _remove_if_left(left)
    directory = Directory(Path(tempfile.mkdtemp(prefix=_PREFIX)))
    atexit.register(shutil.rmtree, directory.root, ignore_errors=True)
    return directory


def _remove_if_left(path: Path) -> None:
    try:
        state = path.lstat()
        new = time.time() - state.st_mtime < _NEW_SECONDS  # it may be about to be claimed
        ours = not new and state.st_uid == os.getuid() and (path / "server.lock").is_file()
        lock = Directory(path).claim("server") if ours and not path.is_symlink() else None
    except OSError:
        return
    if lock is not None:
        shutil.rmtree(path, ignore_errors=True)
        lock.release()
