"""Who holds a port: asked only when a bind has failed, to tell the operator."""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path

from proxyd.api.service import Protocol
from proxyd.host.netlink import NETLINK_SOCK_DIAG, Message, Netlink, packed
from proxyd.state.spec import ListenerKey

# linux/inet_diag.h, linux/sock_diag.h
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST = struct.Struct("=BBBBI")  # family, protocol, extensions, padding, states
_SOCKET = struct.Struct(
    ">HH16s16s"
)  # ports and addresses of source and destination, then interface and cookie
_ANSWER_SOURCE = 4  # family, state, timer, retransmits come before the socket
_ANSWER_INODE = 68
_LISTEN = 1 << 10
_ANY_STATE = 0xFFFFFFFF
_NUMBERS = {Protocol.TCP: socket.IPPROTO_TCP, Protocol.UDP: socket.IPPROTO_UDP}

# Conflicts may come in hundreds and must not hold up control. Looking through /proc takes at most this many seconds ...
_SCAN_SECONDS = 0.05
# ... and a tenth of the time in the long run; what was not used adds up to this many seconds of waiting.
_PAUSE = 10
_SAVED = 5.0


class _Scan:
    """When /proc may be looked through again."""

    not_before = 0.0


def holder(key: ListenerKey) -> str:
    """Name and pid of the process whose socket is in the way of a listener: `nginx (pid 812)`.

    "" where that cannot be found: no right to see other processes' descriptors, or no time.
    """
    try:
        inodes = _inodes(key)
    except OSError:
        return ""
    started = time.monotonic()
    if not inodes or started < _Scan.not_before:
        return ""
    found = _owner(inodes, started + _SCAN_SECONDS)
    now = time.monotonic()
    _Scan.not_before = max(_Scan.not_before, now - _SAVED) + _PAUSE * (now - started)
    return found


def _inodes(key: ListenerKey) -> set[int]:
    """Sockets bound to the key's port, at its address or at all addresses."""
    protocol = _NUMBERS.get(key.protocol)
    if protocol is None:
        return set()
    family, address = packed(key.ip)
    states = _LISTEN if key.protocol is Protocol.TCP else _ANY_STATE
    found = set()
    with Netlink(NETLINK_SOCK_DIAG) as netlink:
        # An IPv6 socket at [::] may hold the IPv4 port too.
        for asked in {family, socket.AF_INET6}:
            body = (
                _REQUEST.pack(asked, protocol, 0, 0, states) + _SOCKET.pack(key.port, 0, b"", b"") + bytes(12)
            )
            for message in netlink.dump(Message(_SOCK_DIAG_BY_FAMILY, body)):
                port, _, source, _ = _SOCKET.unpack_from(message.body, _ANSWER_SOURCE)
                bound = source[:4] if asked == socket.AF_INET else source
                if port == key.port and (bound == address or not any(bound)):
                    found.add(struct.unpack_from("=I", message.body, _ANSWER_INODE)[0])
    return found


def _owner(inodes: set[int], deadline: float) -> str:
    names = {f"socket:[{inode}]" for inode in inodes}
    # os.scandir and os.readlink: several times faster than Path, and there may be many descriptors.
    with os.scandir("/proc") as folders:
        processes = sorted(int(folder.name) for folder in folders if folder.name.isdigit())
    for process in processes:
        if time.monotonic() > deadline:
            break
        try:
            with os.scandir(f"/proc/{process}/fd") as descriptors:
                if any(os.readlink(descriptor.path) in names for descriptor in descriptors):  # noqa: PTH115 - see above
                    name = Path(f"/proc/{process}/comm").read_text(encoding="utf-8", errors="replace").strip()
                    return f"{name} (pid {process})"
        except OSError:  # gone meanwhile, or somebody else's
            continue
    return ""
