"""Runs a command that must not outlive whoever started it: ``python -m ... COMMAND ...``.

Standard input stays open as long as that process lives. When it ends, the command is asked to end,
and all that it started is killed soon after, also where the starting process was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

LAST_SECONDS = 5.0
"""What the command has for an orderly end."""


def main() -> None:
    """Leads a process group of its own (`start_new_session`), which ends with it."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_starter, args=[command], daemon=True).start()
    command.wait()
    os.killpg(0, signal.SIGKILL)


def _end_with_starter(command: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()
    command.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        command.wait(LAST_SECONDS)
    time.sleep(0.1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
