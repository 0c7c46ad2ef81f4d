"""Orphans: children that the program before an upgrade started, and that nobody waits for any more."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Container
from pathlib import Path


class Orphans:
    """Waits for orphans, so that none of them becomes a zombie.

    Make it before this program starts a process of its own.

    Args:
        known: pids of children that somebody else waits for.
    """

    def __init__(self, known: Container[int]) -> None:
        self._pids = [pid for pid in _children() if pid not in known]

    def watch(self) -> None:
        """Wait for them in the event loop from now on."""
        for pid in self._pids:
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid)
                asyncio.get_running_loop().add_reader(pidfd, _ended, pid, pidfd)


def _children() -> list[int]:
    """Pids of the children of this process, which has only one thread so far."""
    try:
        return [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]
    except OSError:
        return []  # a kernel without CONFIG_PROC_CHILDREN


def _ended(pid: int, pidfd: int) -> None:
    asyncio.get_running_loop().remove_reader(pidfd)
    os.close(pidfd)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
