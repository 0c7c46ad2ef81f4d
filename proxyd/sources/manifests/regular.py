"""Reads one regular file, whatever else its name may stand for."""

from __future__ import annotations

import hashlib
import os
import stat
import time

from proxyd.sources.manifests.files import Stamp

MAX_FILE_BYTES = 64 << 20
# File systems stamp times in steps of a few milliseconds: a file read within this time of its last change may change
# again under the same stamp, so it is read once more at the next scan.
_SETTLED_NS = 50_000_000


def read_regular(path: str) -> tuple[bytes, Stamp | None]:
    """Content and stamp of a file; no stamp where it may still be changing. Never blocks on a FIFO or device.

    Raises:
        OSError: it cannot be opened or read.
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
    """What tells the contents of files apart."""
    return hashlib.blake2b(data, digest_size=16).digest()


def _content(descriptor: int, size: int) -> bytes:
    """What can be read, but not much more than `MAX_FILE_BYTES`; `size` is what the file is said to have."""
    parts: list[bytes] = []
    room = MAX_FILE_BYTES + 1
    while room > 0 and (part := os.read(descriptor, min(size + 1, room))):
        parts.append(part)
        room -= len(part)
        if len(part) <= size:
            # A regular file gives less than it was asked for at its end alone.
            break
        size = 1 << 16
    return b"".join(parts)
