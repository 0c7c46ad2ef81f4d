"""Children that the program before this one had, and that nobody here waits for: they are taken note of when they end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Container
from pathlib import Path


class Strays:
    """Waits for them, so that none stays behind as a zombie.

    To be made before this program starts a process of its own.

    Args:
        known: children that somebody else waits for.
    """

    def __init__(self, known: Container[int]) -> None:
        self._pids = [pid for pid in _children() if pid not in known]

    def watch(self) -> None:
        """Wait from now on, in the event loop."""
        for pid in self._pids:
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid)
                asyncio.get_running_loop().add_reader(pidfd, _ended, pid, pidfd)


def _children() -> list[int]:
    """Of this process, which has one thread as yet."""
    try:
        return [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]
    except OSError:
        return []  # the kernel does not say


def _ended(pid: int, pidfd: int) -> None:
    asyncio.get_running_loop().remove_reader(pidfd)
    os.close(pidfd)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
