"""The directory that a server keeps its files in."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sglang_batchllm.server.batches.directory import Directory, DirectoryError, check, temporary


def test_a_directory_is_made_for_its_user_alone(tmp_path: Path):
    check(str(tmp_path / "new" / "files"))
    root = tmp_path / "new" / "files"
    assert root.stat().st_mode & 0o777 == 0o700
    assert (root / "files").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["a file", "a file/below"])
def test_what_is_no_directory_is_refused(tmp_path: Path, name: str):
    (tmp_path / "a file").write_text("")
    path = tmp_path / name
    with pytest.raises(DirectoryError) as caught:
        check(str(path))
    message = str(caught.value)
    assert message.startswith(f"files cannot be kept in {path}: ")
    assert message.endswith("; name a directory that can be written to.")


def test_a_directory_has_one_server(tmp_path: Path):
    directory = Directory(tmp_path)
    directory.make()
    lock = directory.claim_server()
    with pytest.raises(DirectoryError) as caught:
        check(str(tmp_path))
    assert str(caught.value) == (
        f"another server keeps its files in {tmp_path}; name another directory, or stop that "
        "server."
    )
    lock.release()
    check(str(tmp_path))


def test_a_lock_goes_with_its_process(tmp_path: Path):
    """Killed or not; and its children do not have it."""
    directory = Directory(tmp_path)
    directory.make()
    program = (
        "import subprocess, sys, pathlib\n"
        "from sglang_batchllm.server.batches.directory import Directory\n"
        f"Directory(pathlib.Path({str(tmp_path)!r})).claim_server()\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        assert directory.claim("server") is None
        holder.kill()
        holder.wait()
        assert directory.claim("server") is not None
    finally:
        os.kill(child, 9)


def test_temporary_directories_of_killed_servers_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, used, begun = temporary(), temporary(), temporary()
    for each in (left, used, begun):
        each.make()
    left.claim_server().release()
    begun.claim_server().release()
    lock = used.claim_server()
    for each in (left, used):
        os.utime(each.root, (0, 0))
    foreign = tmp_path / "sglang-batchllm-files-of-mine"
    foreign.mkdir()
    new = temporary()
    assert new.root.is_dir() and used.root.is_dir() and begun.root.is_dir() and foreign.is_dir()
    assert not left.root.exists()
    lock.release()


@pytest.mark.parametrize("name", ["../x", "file-", "file-" + "0" * 31, "file-" + "0" * 32 + "\n"])
def test_only_ids_become_paths(tmp_path: Path, name: str):
    directory = Directory(tmp_path)
    for path in (directory.content, directory.upload, directory.run):
        with pytest.raises(AssertionError):
            path(name)
