"""Which process holds which connection of a namespace: /proc/net/tcp joined with the descriptors of a process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tests.support.netlab import Namespace


def client_ports(namespace: Namespace, local_port: int) -> dict[str, int]:
    """Socket inode -> the client's port, for every IPv4 connection to this local port of the namespace."""
    found = {}
    for line in namespace.call(Path("/proc/thread-self/net/tcp").read_text).splitlines()[1:]:
        words = line.split()
        local, remote, inode = words[1], words[2], words[9]
        if int(local.split(":")[1], 16) == local_port and remote.split(":")[1] != "0000":
            found[inode] = int(remote.split(":")[1], 16)
    return found


def held_by(pid: int) -> set[str]:
    """Inodes of the sockets that a process has open."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            target = str(entry.readlink())
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    return inodes
