"""Finds the process that holds a port, to name it to the operator when a bind has failed or would fail."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Container, Iterable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from proxyd.api.service import Protocol
from proxyd.host.claim import CLAIM
from proxyd.host.netlink import NETLINK_SOCK_DIAG, Message, Netlink, attributes, packed, unpacked
from proxyd.state.spec import Endpoint, ListenerKey

# linux/inet_diag.h, linux/sock_diag.h
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST = struct.Struct("=BBBBI")  # family, protocol, extensions, padding, states
_SOCKET = struct.Struct(">HH16s16s")  # ports and addresses of source and destination, interface, cookie
_ANSWER_SOURCE = 4  # family, state, timer, retransmits come before the socket
_ANSWER_INODE = 68
_V6ONLY = 11  # INET_DIAG_SKV6ONLY
_LISTEN = 1 << 10
_UNCONNECTED = 1 << 7
_ANY_STATE = 0xFFFFFFFF
_MAPPED = bytes(10) + b"\xff\xff"  # an IPv4 address within IPv6 begins so
_NUMBERS = {Protocol.TCP: socket.IPPROTO_TCP, Protocol.UDP: socket.IPPROTO_UDP}

# Conflicts may come in hundreds, and must not hold up control. One search of /proc takes at most so many
# seconds of processor time (of the clock's time, a busy machine would leave too little) ...
_SCAN_SECONDS = 0.1
# ... and all of them a tenth of the time in the long run; unused time adds up to so many seconds.
_PAUSE = 10
_SAVED = 5.0
# A command that a user waits for may search longer.
_LONG_SCAN_SECONDS = 1.0
# The program's name is among so many words of the command line: `python3 -P -m proxyd run`.
_COMMAND_WORDS = 6
_FEW_PORTS = 8
_NOBODY, _PROXYD = "", "proxyd"  # told apart by identity


class _Scan:
    """When /proc may be searched again."""

    not_before = 0.0


class Holder(NamedTuple):
    """What is in the way of a listener, as far as it can be seen.

    Attributes:
        process: name and pid, such as `nginx (pid 812)`; "" if it cannot be found: that takes the right to
            see other processes' descriptors, and time.
        peer: address and port of the other end, if it is an outgoing connection; "" for who listens.
        ended: the connection has ended, and only the kernel keeps the port, for a minute at most.
    """

    process: str = ""
    peer: str = ""
    ended: bool = False

    def __str__(self) -> str:
        if not self.peer:
            return self.process
        if self.ended:
            return f"an outgoing connection to {self.peer} that has just ended"
        return f"an outgoing connection{f' of {self.process}' if self.process else ''} to {self.peer}"


def holder(key: ListenerKey, *, patient: bool = False) -> Holder:
    """What is in the way of a listener.

    Args:
        key: the listener's key.
        patient: search for up to a second of processor time; not within the event loop.
    """
    try:
        bound = _in_the_way(key)
    except OSError:
        return Holder()
    # An outgoing connection holds a port only where nobody listens at it. Those that a listener of before has
    # accepted are not in the way; they come from high ports, and the others go to low ones.
    listening = [one for one in bound if not one.peer_port]
    if not listening and bound:
        first = min(bound, key=lambda one: one.peer_port)
        return Holder(_named({first.inode}, patient=patient), first.peer, ended=not first.inode)
    return Holder(_named({one.inode for one in listening}, patient=patient))


def _named(inodes: set[int], *, patient: bool) -> str:
    """The process that holds one of these sockets."""
    inodes.discard(0)  # of a connection that has ended
    if not inodes:
        return ""
    if patient:
        return _owner(inodes, _LONG_SCAN_SECONDS)
    now = time.monotonic()
    if now < _Scan.not_before:
        return ""
    began = time.thread_time()
    found = _owner(inodes, _SCAN_SECONDS)
    _Scan.not_before = max(_Scan.not_before, now - _SAVED) + _PAUSE * (time.thread_time() - began)
    return found


def occupied(
    keys: Iterable[ListenerKey], parked: Container[ListenerKey] = frozenset()
) -> dict[ListenerKey, str]:
    """Which of many listeners could not be opened now, as another process holds the port. Nothing is bound.

    Args:
        keys: of the listeners.
        parked: those that only a socket bound to their very address is in the way of.

    Returns:
        The process that holds each such port, as of `holder`. Sockets of a proxyd are left out: it probably
        serves these very listeners. So are those of unknown processes where a proxyd manages the node's
        addresses.

    Raises:
        OSError: netlink failed.
    """
    keys = list(keys)
    sockets: dict[tuple[Protocol, int], list[_Bound]] = {}
    with Netlink(NETLINK_SOCK_DIAG) as netlink:
        for protocol in {key.protocol for key in keys} & _NUMBERS.keys():
            for version in (socket.AF_INET, socket.AF_INET6):
                for bound in _bound(netlink, version, protocol):
                    sockets.setdefault((protocol, bound.port), []).append(bound)
    found = {}
    for key in keys:
        family, address = packed(key.ip)
        inodes = {
            bound.inode
            for bound in sockets.get((key.protocol, key.port), ())
            if bound.in_the_way(family, address) and (any(bound.address) or key not in parked)
        }
        if inodes:
            found[key] = inodes
    if not found:
        return {}
    owners = _owners(set().union(*found.values()), _LONG_SCAN_SECONDS)
    managed = _proxyd_is_here()
    return {
        key: who
        for key, inodes in found.items()
        for who in [next((owners[inode] for inode in inodes if inode in owners), _NOBODY)]
        if not (who is _PROXYD or (who is _NOBODY and managed))
    }


def bound_exactly(keys: Iterable[ListenerKey]) -> dict[ListenerKey, str]:
    """To which of these listeners' very address and port another process than a proxyd is bound, TCP or UDP.

    Returns:
        For each such key the process, as of `holder`; "" where that cannot be seen.

    Raises:
        OSError: the kernel does not say.
    """
    keys = list(keys)
    found: dict[ListenerKey, int] = {}
    with Netlink(NETLINK_SOCK_DIAG) as netlink:
        for protocol, family in sorted({(key.protocol, packed(key.ip)[0]) for key in keys}):
            if protocol not in _NUMBERS:
                continue
            asked = {
                (packed(key.ip)[1], key.port): key
                for key in keys
                if (key.protocol, packed(key.ip)[0]) == (protocol, family)
            }
            # Of a few ports the kernel tells only what is bound to them.
            ports = {key.port for key in asked.values()}
            for port in ports if len(ports) <= _FEW_PORTS else (0,):
                for bound in _bound(netlink, family, protocol, port):
                    if (key := asked.get((bound.address, bound.port))) is not None:
                        found[key] = bound.inode
    if not found:
        return {}
    owners = _owners(set(found.values()), _LONG_SCAN_SECONDS if len(found) < _FEW_PORTS else _SCAN_SECONDS)
    return {
        key: owners.get(inode, _NOBODY) for key, inode in found.items() if owners.get(inode) is not _PROXYD
    }


class _Bound(NamedTuple):
    """A socket that is bound to a port."""

    family: int
    address: bytes
    port: int
    inode: int
    v6only: bool
    peer: str = ""  # address and port of the other end, of a connection
    peer_port: int = 0

    def in_the_way(self, family: int, address: bytes) -> bool:
        """Whether it keeps others from binding its port at this address."""
        if any(self.address):
            return (self.family, self.address) == (family, address)
        return self.family == family or (self.family == socket.AF_INET6 and not self.v6only)


def _bound(
    netlink: Netlink, family: int, protocol: Protocol, port: int = 0, *, connected: bool = False
) -> Iterator[_Bound]:
    """Listening TCP sockets, or UDP sockets that take datagrams of everybody; of one port, or of all (0).

    With `connected` those that are connected too. A socket of IPv6 with an address of IPv4 is one of IPv4.
    """
    states = _LISTEN if protocol is Protocol.TCP else _UNCONNECTED
    if connected:
        states = _ANY_STATE
    body = (
        _REQUEST.pack(family, _NUMBERS[protocol], 0, 0, states) + _SOCKET.pack(port, 0, b"", b"") + bytes(12)
    )
    for message in netlink.dump(Message(_SOCK_DIAG_BY_FAMILY, body)):
        port, peer_port, source, other = _SOCKET.unpack_from(message.body, _ANSWER_SOURCE)
        (inode,) = struct.unpack_from("=I", message.body, _ANSWER_INODE)
        of, address = _plain(family, source)
        v6only = attributes(message.body, _ANSWER_INODE + 4).get(_V6ONLY, b"") == b"\1"
        peer = str(Endpoint(unpacked(_plain(family, other)[1]), peer_port)) if peer_port else ""
        yield _Bound(of, address, port, inode, v6only, peer, peer_port)


def _plain(family: int, address: bytes) -> tuple[int, bytes]:
    """Family and bytes of an address that sock_diag gives for a socket of a family."""
    if family == socket.AF_INET:
        return family, address[:4]
    if address.startswith(_MAPPED):
        return socket.AF_INET, address[len(_MAPPED) :]
    return family, address


def _proxyd_is_here() -> bool:
    try:
        return (
            f"@{CLAIM}" in Path("/proc/self/net/unix").read_text(encoding="utf-8", errors="replace").split()
        )
    except OSError:
        return False


def _owners(inodes: set[int], seconds: float) -> dict[int, str]:
    """The holder of each socket, as far as it is found within so many seconds of processor time."""
    deadline = time.thread_time() + seconds
    names = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, str] = {}
    with os.scandir("/proc") as folders:
        processes = sorted(int(folder.name) for folder in folders if folder.name.isdigit())
    for process in processes:
        if time.thread_time() > deadline or len(found) == len(names):
            break
        try:
            with os.scandir(f"/proc/{process}/fd") as descriptors:
                links = {os.readlink(entry.path) for entry in descriptors}  # noqa: PTH115 - as below
            held = links & names.keys()
            if not held:
                continue
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[:_COMMAND_WORDS]
            ours = any(word.rpartition(b"/")[2].split(b".")[0] == b"proxyd" for word in words)
            who = _PROXYD if ours else _described(process)
        except OSError:  # gone meanwhile, or somebody else's
            continue
        for name in held:
            found.setdefault(names[name], who)
    return found


def _described(process: int) -> str:
    name = Path(f"/proc/{process}/comm").read_text(encoding="utf-8", errors="replace").strip()
    return f"{name} (pid {process})"


def _in_the_way(key: ListenerKey) -> list[_Bound]:
    """The sockets that are bound to the key's port, at its address or at all addresses."""
    if key.protocol is Protocol.SCTP:
        return list(_sctp_endpoints(key))
    family, address = packed(key.ip)
    with Netlink(NETLINK_SOCK_DIAG) as netlink:
        # An IPv6 socket may hold the IPv4 port as well. One at all addresses conflicts with one at any.
        return [
            bound
            for asked in {family, socket.AF_INET6}
            for bound in _bound(netlink, asked, key.protocol, key.port, connected=True)
            if bound.port == key.port
            and (bound.in_the_way(family, address) or (bound.family == family and not any(address)))
        ]


def _sctp_endpoints(key: ListenerKey) -> Iterator[_Bound]:
    """As `_in_the_way`, from /proc: sock_diag would need a kernel module of its own for SCTP."""
    lines = Path("/proc/self/net/sctp/eps").read_text(encoding="ascii").splitlines()[1:]
    family, address = packed(key.ip)
    for line in lines:
        # Columns (net/sctp/proc.c): endpoint, socket, style, state, bucket, port, user, inode, addresses.
        _, _, _, _, _, port, _, inode, *ips = line.split()
        if int(port) == key.port and not {key.ip, "0.0.0.0", "::"}.isdisjoint(_short(ip) for ip in ips):
            yield _Bound(family, address, int(port), int(inode), v6only=False)


def _short(ip: str) -> str:
    return str(ip_address(ip))


def _owner(inodes: set[int], seconds: float) -> str:
    """The holder of one of these sockets; "" if it is not found within so many seconds of processor time."""
    deadline = time.thread_time() + seconds
    names = {f"socket:[{inode}]" for inode in inodes}
    # There may be many descriptors: os.scandir and os.readlink are several times faster than Path.
    with os.scandir("/proc") as folders:
        processes = sorted(int(folder.name) for folder in folders if folder.name.isdigit())
    for process in processes:
        if time.thread_time() > deadline:
            break
        try:
            with os.scandir(f"/proc/{process}/fd") as descriptors:
                if any(os.readlink(entry.path) in names for entry in descriptors):  # noqa: PTH115 - as above
                    return _described(process)
        except OSError:  # gone meanwhile, or somebody else's
            continue
    return ""
