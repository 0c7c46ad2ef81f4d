"""Reads a regular file, and refuses whatever else has its name."""

from __future__ import annotations

import hashlib
import os
import stat
import time

from proxyd.sources.manifests.files import Stamp

MAX_FILE_BYTES = 64 << 20
# File systems count time in steps of a few milliseconds. A file that is read this soon after its last change
# may change again and keep its stamp, so the next scan reads it once more.
_SETTLED_NS = 50_000_000


def read_regular(path: str) -> tuple[bytes, Stamp | None]:
    """Content and stamp of a file; None for the stamp of one that may still be changing.

    It never blocks on a FIFO or device.

    Raises:
        OSError: the file cannot be opened or read.
        ValueError: it is not a regular file, or too large.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise ValueError("is not a file")
        data = _content(descriptor, before.st_size) if before.st_size <= MAX_FILE_BYTES else b""
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if max(before.st_size, len(data)) > MAX_FILE_BYTES:
        raise ValueError(f"not read: it is over {MAX_FILE_BYTES >> 20} MiB")
    settled = abs(time.time_ns() - after.st_ctime_ns) > _SETTLED_NS and Stamp.of(before) == Stamp.of(after)
    return data, Stamp.of(after) if settled else None


def digest(data: bytes) -> bytes:
    """A hash by which the contents of files are compared."""
    return hashlib.blake2b(data, digest_size=16).digest()


def _content(descriptor: int, size: int) -> bytes:
    """The content, up to a little more than `MAX_FILE_BYTES`; `size` is what stat says of it."""
    parts: list[bytes] = []
    room = MAX_FILE_BYTES + 1
    while room > 0 and (part := os.read(descriptor, min(size + 1, room))):
        parts.append(part)
        room -= len(part)
        if len(part) <= size:
            # A read from a regular file is short at the end of the file alone.
            break
        size = 1 << 16
    return b"".join(parts)
