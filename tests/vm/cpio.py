"""Archives that the kernel unpacks as its first files: cpio, format "newc" (Documentation/driver-api/early-userspace)."""

from __future__ import annotations

import stat


class Archive:
    """A cpio archive in memory. Several of them, one after the other, are one to the kernel."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0

    def folder(self, name: str) -> None:
        """Add a folder; its parent has to be there already."""
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file."""
        self._add(name, stat.S_IFREG | mode, data)

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device and special device (major, minor each), name size, checksum
        numbers = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        self._out += b"070701" + b"".join(b"%08x" % number for number in numbers) + path
        self._align()
        self._out += data
        self._align()

    def _align(self) -> None:
        self._out += bytes(-len(self._out) % 4)

    def data(self) -> bytes:
        """The whole archive, ended."""
        self._add("TRAILER!!!", 0, b"")
        return bytes(self._out)
