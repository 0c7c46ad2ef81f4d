"""Pipes that move bulk from one socket to another without copying it: splice(2).

A side of a relay borrows a pipe for one turn. Bytes that the other socket has no room for stay in the pipe,
and that socket keeps the pipe until it has taken them. A worker has few pipes: a side that gets none copies.
"""

from __future__ import annotations

import fcntl
import os
from _socket import socket as Socket  # noqa: N812 as in `pump`
from collections.abc import Callable
from time import monotonic

# The default of fs.pipe-max-size. With 256 KiB a byte takes 15 % more processor time, with 64 KiB 90 %.
PIPE_BYTES = 1 << 20
MAX_PIPES = 16
# How long to wait after the user was refused more pipe memory (fs.pipe-user-pages-soft). Others close their
# pipes meanwhile, as the workers from before an upgrade do.
_PAUSE_SECONDS = 1.0

_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Pipe:
    """A pipe with `left` bytes in it.

    Both sockets have to be non-blocking: the flag of splice(2) is only about the pipe.
    """

    __slots__ = ("_read_end", "_write_end", "left")

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.left = 0

    def grow(self) -> bool:
        """Make it large; False where the kernel forbids it. Small, it is no better than copying."""
        try:
            fcntl.fcntl(self._write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            return False
        return True

    def fill(self, sock: Socket) -> int:
        """Take from a socket the bytes that are there and fit.

        Returns:
            How many; 0 at the end of the stream, or at urgent data before it.

        Raises:
            BlockingIOError: no bytes are there, or the pipe is full.
            OSError: as of recv(2); EINVAL, ENOSYS, EPERM: there is no splice(2) here.
        """
        size = os.splice(sock.fileno(), self._write_end, PIPE_BYTES, flags=_FLAGS)
        self.left += size
        return size

    def drain(self, sock: Socket) -> int:
        """Give a socket the bytes that it has room for.

        Returns:
            How many.

        Raises:
            BlockingIOError: it has no room.
            OSError: as of send(2).
        """
        # Exactly as many as there are: if more were promised, the kernel would keep the last packet back.
        size = os.splice(self._read_end, sock.fileno(), self.left, flags=_FLAGS)
        self.left -= size
        return size

    def close(self) -> None:
        """Close; bytes that are in it are lost."""
        os.close(self._read_end)
        os.close(self._write_end)

    def __len__(self) -> int:
        """How many bytes are in it."""
        return self.left


class Pipes:
    """The pipes of one worker.

    Args:
        most: how many there may be; 0: nobody gets one.
        now: monotonic seconds.
    """

    def __init__(self, most: int = MAX_PIPES, now: Callable[[], float] = monotonic) -> None:
        self.most = most
        self._now = now
        self.made = 0
        self._not_before = 0.0  # the user has used up the pipe memory
        self._free: list[Pipe] = []

    def take(self) -> Pipe | None:
        """Lend an empty pipe; None where there is none."""
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
        """Take a pipe back. Bytes that are in it are thrown away."""
        if pipe.left:
            pipe.close()
            self.made -= 1
        else:
            self._free.append(pipe)

    def refuse(self) -> None:
        """Lend none any more, as the kernel can't splice."""
        self.most = 0
        self.shut()

    def shut(self) -> None:
        """Close the pipes that are not lent."""
        self.made -= len(self._free)
        for pipe in self._free:
            pipe.close()
        self._free.clear()
