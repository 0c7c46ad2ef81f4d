"""inotify(7), through the C library: without a thread, and for file names of any bytes."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import NamedTuple

MODIFY = 0x2
ATTRIB = 0x4
CLOSE_WRITE = 0x8
MOVED_FROM = 0x40
MOVED_TO = 0x80
CREATE = 0x100
DELETE = 0x200
DELETE_SELF = 0x400
MOVE_SELF = 0x800
OVERFLOW = 0x4000  # events were lost
IGNORED = 0x8000  # the watch has ended
_ONLYDIR = 0x1000000
ISDIR = 0x40000000

_CHANGES = MODIFY | ATTRIB | CLOSE_WRITE | MOVED_FROM | MOVED_TO | CREATE | DELETE | DELETE_SELF | MOVE_SELF
_EVENT = struct.Struct("iIII")
_BUFFER = 1 << 16


class Event(NamedTuple):
    """What happened to an entry of a watched folder, or to the folder itself where `name` is ""."""

    folder: str
    name: str
    mask: int
    cookie: int  # equal for the two events of one rename


class Inotify:
    """An inotify instance that watches folders.

    Raises:
        OSError: EMFILE if the user may have no more instances.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "")
        self._folders: dict[int, str] = {}  # by watch descriptor
        self._numbers: dict[str, int] = {}

    def fileno(self) -> int:
        """The instance's descriptor; it is readable while there are events."""
        return self._fd

    def close(self) -> None:
        """Close the instance; more calls do nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def watch(self, folder: str) -> None:
        """Watch the entries of a folder; events name it as it is named here.

        Raises:
            OSError: ENOSPC if the user may have no more watches; or the folder can't be read.
        """
        mask = _CHANGES | _ONLYDIR
        number = self._checked(self._libc.inotify_add_watch(self._fd, os.fsencode(folder), mask), folder)
        # A folder that was moved keeps its watch descriptor.
        earlier = self._folders.get(number)
        if earlier is not None and earlier != folder:
            self._numbers.pop(earlier, None)
        self._folders[number] = folder
        self._numbers[folder] = number

    def unwatch(self, folder: str) -> None:
        """Stop watching a folder; one that is not watched is ignored."""
        number = self._numbers.pop(folder, None)
        if number is not None and self._folders.get(number) == folder:
            del self._folders[number]
            self._libc.inotify_rm_watch(self._fd, number)

    @property
    def folders(self) -> frozenset[str]:
        """The folders that are watched."""
        return frozenset(self._numbers)

    def read(self) -> list[Event]:
        """The oldest events that wait, as many as fit in 64 KiB; none if there are none."""
        try:
            data = os.read(self._fd, _BUFFER)
        except BlockingIOError:
            return []
        events = []
        offset = 0
        while offset < len(data):
            number, mask, cookie, length = _EVENT.unpack_from(data, offset)
            start = offset + _EVENT.size
            offset = start + length
            if mask & OVERFLOW:
                events.append(Event("", "", mask, 0))
                continue
            folder = self._folders.get(number)
            if folder is None:
                continue
            if mask & IGNORED:
                del self._folders[number]
                if self._numbers.get(folder) == number:
                    del self._numbers[folder]
            name = os.fsdecode(data[start:offset].rstrip(b"\0"))
            events.append(Event(folder, name, mask, cookie))
        return events

    @staticmethod
    def _checked(result: int, path: str) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
        return result


def exhausted(error: OSError) -> bool:
    """Whether an error says that the user may have no more instances or watches."""
    return error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOSPC}
