"""Netlink messages about routes: those that proxyd makes, and the one that the kernel takes to an address."""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

from proxyd.host.netlink import RTM_GETROUTE, Message, Netlink, attribute, attributes, packed, u32, unpacked

# The route protocol number of everything that proxyd makes, by which what a killed process left is found.
# linux/rtnetlink.h leaves such numbers to administrators.
ROUTE_PROTOCOL = 112

# linux/rtnetlink.h
RTN_LOCAL = 2
RT_SCOPE_HOST = 254
RT_TABLE_LOCAL = 255
_LOOPBACK_INDEX = 1  # of `lo`, in every network namespace (net/flow.h)
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC, RTA_MULTIPATH, RTA_TABLE = 1, 4, 5, 7, 9, 15

ROUTE = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags


def local_route(ip: str, table: int, kind: int, flags: int = 0, source: str | None = None) -> Message:
    """The message that makes (RTM_NEWROUTE) or removes (RTM_DELROUTE) proxyd's `local IP dev lo` in a table.

    Args:
        ip: the address.
        table: the number of the routing table.
        kind: RTM_NEWROUTE or RTM_DELROUTE.
        flags: NLM_F_*.
        source: the address from which the node's own connections to `ip` come; None: the kernel chooses.

    Raises:
        ValueError: `ip` is not an address.
    """
    family, address = packed(ip)
    scope = RT_SCOPE_HOST if family == socket.AF_INET else 0  # IPv6 routes have no scope
    small = table if table < 256 else 0
    body = [
        ROUTE.pack(family, 8 * len(address), 0, 0, small, ROUTE_PROTOCOL, scope, RTN_LOCAL, 0),
        attribute(RTA_DST, address),
        attribute(RTA_OIF, u32(_LOOPBACK_INDEX)),
        attribute(RTA_TABLE, u32(table)),
    ]
    if source is not None:
        body.append(attribute(RTA_PREFSRC, packed(source)[1]))
    return Message(kind, b"".join(body), flags)


class LocalRoute(NamedTuple):
    """One of proxyd's local routes in the kernel."""

    ip: str
    source: str | None


def local_routes(netlink: Netlink, table: int) -> list[LocalRoute]:
    """Proxyd's own local routes in a table, of both families.

    Raises:
        OSError: the kernel refused.
    """
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        small = table if table < 256 else 0
        body = ROUTE.pack(family, 0, 0, 0, small, ROUTE_PROTOCOL, 0, RTN_LOCAL, 0)
        try:
            messages = netlink.dump(Message(RTM_GETROUTE, body + attribute(RTA_TABLE, u32(table))))
        except OSError as error:
            if error.errno in (
                errno.ENOENT,
                errno.EOPNOTSUPP,
                errno.EAFNOSUPPORT,
            ):  # there is no such table or family
                continue
            raise
        for message in messages:
            header = ROUTE.unpack_from(message.body)
            seen = attributes(message.body, ROUTE.size)
            # Kernels before 4.20 do not filter the dump.
            if (
                header[0] != family
                or header[5] != ROUTE_PROTOCOL
                or header[7] != RTN_LOCAL
                or RTA_DST not in seen
            ):
                continue
            if (struct.unpack("=I", seen[RTA_TABLE])[0] if RTA_TABLE in seen else header[4]) != table:
                continue
            source = seen.get(RTA_PREFSRC)
            found.append(LocalRoute(unpacked(seen[RTA_DST]), unpacked(source) if source else None))
    return found


class RouteChoice(NamedTuple):
    """The kernel's route to an address: route type, interface index, source address."""

    kind: int
    interface: int
    source: str | None


def route_to(netlink: Netlink, ip: str) -> RouteChoice | None:
    """The kernel's route to an address; None if there is none. Nothing is sent.

    Raises:
        OSError: netlink failed.
        ValueError: `ip` is not an address.
    """
    family, address = packed(ip)
    body = ROUTE.pack(family, 8 * len(address), 0, 0, 0, 0, 0, 0, 0) + attribute(RTA_DST, address)
    try:
        message = netlink.get(Message(RTM_GETROUTE, body))
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
        return None
    seen = attributes(message.body, ROUTE.size)
    interface = struct.unpack("=I", seen[RTA_OIF])[0] if RTA_OIF in seen else 0
    source = seen.get(RTA_PREFSRC)
    return RouteChoice(ROUTE.unpack_from(message.body)[7], interface, unpacked(source) if source else None)
