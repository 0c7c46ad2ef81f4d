"""News of what others change on the node: addresses, interfaces, and what proxyd has made there.

The kernel multicasts every change. What proxyd changes is told apart by the port id of the netlink socket
that asked for it, or of the `nft` that did. Of routes a socket filter lets pass only those with its protocol
number that go away, so that a routing daemon's thousands cost nothing here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from proxyd.host.fib import ROUTE_PROTOCOL
from proxyd.host.netlink import (
    NETLINK_NETFILTER,
    NETLINK_ROUTE,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWROUTE,
    attributes,
    is_own,
)

# linux/rtnetlink.h: RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV4_RULE, _IPV6_IFADDR, _IPV6_ROUTE, and
# RTNLGRP_IPV6_RULE (19), which has no such name
_ROUTE_GROUPS = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << 18
_NFTABLES_GROUP = 1 << 6  # linux/netfilter/nfnetlink.h: NFNLGRP_NFTABLES (7)
_OWN_TABLES = b"proxyd"
# linux/netfilter/nf_tables.h: something was deleted, of tables, chains, rules, sets and elements
_NFT_REMOVALS = frozenset(10 << 8 | message for message in (2, 5, 8, 11, 14))
_NFTA_TABLE = 1
_NFGENMSG = 4  # bytes

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_RULE = 12  # bytes of struct fib_rule_hdr
_FRA_PROTOCOL = 21
_IFINDEX = 4  # where it is in struct ifinfomsg
_LOOPBACK_INDEX = 1
_RTM_PROTOCOL = 5  # where it is in struct rtmsg
_ADDRESSES_AND_LINKS = frozenset({RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR})
_DRAIN = 1 << 16

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# linux/bpf_common.h
_LOAD_HALF, _LOAD_BYTE, _JUMP_IF_EQUAL, _RETURN = 0x28, 0x30, 0x15, 0x06
_STEP = struct.Struct("=HBBI")  # code, how far to jump where equal and where not, operand


class News(NamedTuple):
    """What has happened since the last look; false where nothing has.

    Attributes:
        addresses: addresses or interfaces have changed.
        routes: routes of proxyd's may be gone.
        rules: policy rules of proxyd's may be gone.
        tables: nft tables of proxyd's that somebody else has taken something out of, or deleted.
        overflow: the kernel had to drop news, so anything may have happened.
    """

    addresses: bool = False
    routes: bool = False
    rules: bool = False
    tables: frozenset[str] = frozenset()
    overflow: bool = False

    def __bool__(self) -> bool:
        return any(self)


class NodeMonitor:
    """Says what has changed. Wait for any of `descriptors` to be readable, then `drain()`.

    Args:
        tables: follow nft tables too; it takes CAP_NET_ADMIN, without which they are not followed.

    Raises:
        OSError: netlink is not allowed.
    """

    def __init__(self, *, tables: bool = False) -> None:
        self._routes = _subscribed(NETLINK_ROUTE, _ROUTE_GROUPS, _route_filter())
        self._tables: socket.socket | None = None
        if tables:
            with contextlib.suppress(OSError):  # no right, or no nftables in this kernel
                self._tables = _subscribed(NETLINK_NETFILTER, _NFTABLES_GROUP)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Those to wait for."""
        return tuple(sock.fileno() for sock in (self._routes, self._tables) if sock is not None)

    def drain(self) -> News:
        """Take all news. Of any number of changes they are no more than the sockets hold."""
        addresses = routes = rules = overflow = False
        tables: set[str] = set()
        for data in _received(self._routes):
            if not data:
                addresses = routes = rules = overflow = True
                continue
            kind, sender, body = next(_messages(data))  # one for each datagram
            if kind in _ADDRESSES_AND_LINKS:
                addresses = True
                # Where `lo` goes down IPv6 routes go, and of IPv4's nobody is told.
                routes = routes or (kind == RTM_NEWLINK and _index(body) == _LOOPBACK_INDEX)
            elif not is_own(sender):
                routes = routes or (kind == RTM_DELROUTE and body[_RTM_PROTOCOL] == ROUTE_PROTOCOL)
                rules = rules or (kind == RTM_DELRULE and _is_own_rule(body))
        for data in _received(self._tables) if self._tables is not None else ():
            if not data:
                overflow = True
            elif _OWN_TABLES in data:  # of others' thousands nothing is looked at
                tables.update(_robbed(data))
        return News(addresses, routes, rules, frozenset(tables), overflow)

    def close(self) -> None:
        """Close the descriptors; take them out of the event loop first."""
        for sock in (self._routes, self._tables):
            if sock is not None:
                sock.close()


def _subscribed(protocol: int, groups: int, only: bytes = b"") -> socket.socket:
    """A socket that gets the messages of multicast groups, those that a filter lets pass."""
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    sock = socket.socket(socket.AF_NETLINK, kind, protocol)
    try:
        if only:
            code = ctypes.create_string_buffer(only, len(only))
            program = struct.pack("HP", len(only) // _STEP.size, ctypes.addressof(code))  # struct sock_fprog
            sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        sock.bind((0, groups))
    except OSError:
        sock.close()
        raise
    return sock


def _route_filter() -> bytes:
    """Everything but new routes, and routes of others that go away. Loads see bytes in network order."""
    gone, new = socket.htons(RTM_DELROUTE), socket.htons(RTM_NEWROUTE)
    steps = (
        (_LOAD_HALF, 0, 0, 4),  # the type of the message
        (_JUMP_IF_EQUAL, 0, 2, gone),  # else to the comparison with a new one
        (_LOAD_BYTE, 0, 0, _HEADER.size + _RTM_PROTOCOL),
        (_JUMP_IF_EQUAL, 1, 2, ROUTE_PROTOCOL),  # to `pass` or `drop`
        (_JUMP_IF_EQUAL, 1, 0, new),  # to `drop` or `pass`
        (_RETURN, 0, 0, 0xFFFFFFFF),  # pass
        (_RETURN, 0, 0, 0),  # drop
    )
    return b"".join(_STEP.pack(*step) for step in steps)


def _received(sock: socket.socket) -> Iterator[bytes]:
    """Every datagram that there is; an empty one where the kernel had to drop some."""
    while True:
        try:
            yield sock.recv(_DRAIN)
        except BlockingIOError:
            return
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield b""


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, port id of the sender and body of each message."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, _, sender = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            return
        yield kind, sender, data[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3


def _robbed(data: bytes) -> Iterator[str]:
    """Proxyd's tables that somebody else has taken something out of."""
    for kind, sender, body in _messages(data):
        if kind in _NFT_REMOVALS and not is_own(sender):
            name = attributes(body, _NFGENMSG).get(_NFTA_TABLE, b"").rstrip(b"\0")
            if name.startswith(_OWN_TABLES):
                yield name.decode("ascii", "replace")


def _is_own_rule(body: bytes) -> bool:
    return attributes(body, _RULE).get(_FRA_PROTOCOL) == bytes([ROUTE_PROTOCOL])


def _index(body: bytes) -> int:
    return int(struct.unpack_from("=i", body, _IFINDEX)[0])
