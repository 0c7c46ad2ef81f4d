"""Pipes that bulk goes through from one socket to another without being copied: splice(2).

A pipe is on loan for one turn. What the other socket has no room for stays in it, and the pipe with that
socket, until it has gone. There are few: who gets none copies.
"""

from __future__ import annotations

import fcntl
import os
from _socket import socket as Socket  # noqa: N812 as in `pump`
from collections.abc import Callable
from time import monotonic

# fs.pipe-max-size, as it is by default. 256 KiB take 15 % more processor time for each byte, 64 KiB 90 %.
PIPE_BYTES = 1 << 20
MAX_PIPES = 16
# After so long it is tried again whether the user may have more (fs.pipe-user-pages-soft): others close
# theirs, such as the workers from before an upgrade.
_PAUSE_SECONDS = 1.0

_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Pipe:
    """`left` bytes are in it. Both sockets have to be non-blocking: the flag of splice(2) is about the pipe only."""

    __slots__ = ("_read_end", "_write_end", "left")

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.left = 0

    def grow(self) -> bool:
        """Make it large; whether the kernel allows it. Before, it holds 64 KiB or less, and a copy costs no more."""
        try:
            fcntl.fcntl(self._write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            return False
        return True

    def fill(self, sock: Socket) -> int:
        """Take from a socket what is there and fits; how many bytes, 0 at its end and at urgent data before its end.

        Raises:
            BlockingIOError: there is nothing, if the pipe was empty before.
            OSError: as of recv(2); EINVAL, ENOSYS, EPERM: it is not to be had here.
        """
        size = os.splice(sock.fileno(), self._write_end, PIPE_BYTES, flags=_FLAGS)
        self.left += size
        return size

    def drain(self, sock: Socket) -> int:
        """Give to a socket what it has room for; how many bytes.

        Raises:
            BlockingIOError: it has no room.
            OSError: as of send(2).
        """
        # Exactly what is there: where more is promised the kernel keeps the last packet back.
        size = os.splice(self._read_end, sock.fileno(), self.left, flags=_FLAGS)
        self.left -= size
        return size

    def close(self) -> None:
        """Close, with what is in it."""
        os.close(self._read_end)
        os.close(self._write_end)

    def __len__(self) -> int:
        """How many bytes are in it."""
        return self.left


class Pipes:
    """Of one worker.

    Args:
        most: how many there may be; 0: nobody gets one.
        now: monotonic seconds.
    """

    def __init__(self, most: int = MAX_PIPES, now: Callable[[], float] = monotonic) -> None:
        self.most = most
        self._now = now
        self.made = 0
        self._not_before = 0.0  # the user had used up what there is
        self._free: list[Pipe] = []

    def take(self) -> Pipe | None:
        """An empty pipe; None where there is none to be had."""
        if self._free:
            return self._free.pop()
        if self.made >= self.most or self._now() < self._not_before:
            return None
        try:
            pipe = Pipe()
        except OSError:  # no descriptor; later there may be one
            return None
        if not pipe.grow():
            pipe.close()
            self._not_before = self._now() + _PAUSE_SECONDS
            return None
        self.made += 1
        return pipe

    def give(self, pipe: Pipe) -> None:
        """Give back. What is in it is thrown away."""
        if pipe.left:
            pipe.close()
            self.made -= 1
        else:
            self._free.append(pipe)

    def refuse(self) -> None:
        """Lend none any more: the kernel can't."""
        self.most = 0
        self.shut()

    def shut(self) -> None:
        """Close those that are not on loan."""
        self.made -= len(self._free)
        for pipe in self._free:
            pipe.close()
        self._free.clear()
