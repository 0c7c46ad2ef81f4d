"""Which files are opened, by anybody: inotify's IN_OPEN."""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Self

_IN_OPEN = 0x20
_HEADER = struct.Struct("iIII")


class Opens:
    """Notes each opening of a file in one folder, until it is closed.

    Args:
        folder: the folder itself; what is in folders below it is not noted.
    """

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert libc.inotify_add_watch(self._descriptor, os.fsencode(folder), _IN_OPEN) >= 0

    def take(self) -> list[str]:
        """The names of the files, once for each time that one was opened since this was last called."""
        names = []
        with suppress(BlockingIOError):
            while data := os.read(self._descriptor, 1 << 16):
                offset = 0
                while offset < len(data):
                    length = _HEADER.unpack_from(data, offset)[3]
                    name = data[offset + _HEADER.size : offset + _HEADER.size + length].rstrip(b"\0")
                    offset += _HEADER.size + length
                    if name:  # else it is the folder itself
                        names.append(os.fsdecode(name))
        return names

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
