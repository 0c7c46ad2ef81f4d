"""What is in use around this node: the networks that it is connected to, next hops and neighbours."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import struct
import sys
from collections.abc import Collection, Iterator
from typing import NamedTuple

from proxyd.host.addresses import InterfaceAddress, interface_addresses
from proxyd.host.fib import ROUTE, RTA_GATEWAY, RTA_MULTIPATH, RTA_OIF, RTA_TABLE
from proxyd.host.netlink import (
    RTM_GETNEIGH,
    RTM_GETROUTE,
    Message,
    Netlink,
    attribute,
    attributes,
    u32,
    unpacked,
)
from proxyd.state.occupied import Occupied
from proxyd.state.snapshot import NodeAddress

# linux/rtnetlink.h
_RT_TABLE_MAIN = 254
_NEXTHOP = struct.Struct("=HBBi")  # length, flags, hops, interface index
# linux/rtnetlink.h, linux/netconf.h
_RTM_GETNETCONF = 82
_NETCONFA_IFINDEX, _NETCONFA_PROXY_NEIGH = 1, 5
_ALL_INTERFACES = -1
# linux/neighbour.h
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # family, interface index, state, flags, type
_NDA_DST = 1
_NUD_VALID = 0x02 | 0x04 | 0x08 | 0x10 | 0x80  # reachable, stale, delay, probe, permanent
_NAME = re.compile(r"[A-Za-z0-9_.:@-]+")  # of an interface, as nft takes it between quotes
# The routes that are searched for next hops: a router of the internet has a million.
_MAX_ROUTES = 5000


class Links(NamedTuple):
    """What ARP for VIPs depends on, in order. Names of interfaces that nft can't be told are left out.

    Attributes:
        own: each interface with its first IPv4 address.
        networks: each interface with the IPv4 networks that it is connected to.
        proxies: interfaces on which the node answers for all that it has a route to (proxy_arp).
    """

    own: tuple[tuple[str, str], ...] = ()
    networks: tuple[tuple[str, str], ...] = ()
    proxies: frozenset[str] = frozenset()


def links() -> Links:
    """The links that there are.

    Raises:
        OSError: netlink failed.
    """
    with Netlink() as netlink:
        addresses = [
            one
            for one in interface_addresses(netlink)
            if ":" not in one.ip and not one.lonely and _NAME.fullmatch(one.interface)
        ]
        proxies = _proxies(netlink)
    own: dict[str, str] = {}
    for one in addresses:
        own.setdefault(one.interface, one.ip)
    networks = {(one.interface, one.network) for one in addresses if not _is_alone(one)}
    return Links(tuple(sorted(own.items())), tuple(sorted(networks)), proxies)


def _proxies(netlink: Netlink) -> frozenset[str]:
    """Interfaces with proxy_arp. Netlink tells what /proc/sys does, which the unit hides."""
    found = set()
    for message in netlink.dump(Message(_RTM_GETNETCONF, bytes([socket.AF_INET, 0, 0, 0]))):
        seen = attributes(message.body, 4)
        if _NETCONFA_IFINDEX in seen and any(seen.get(_NETCONFA_PROXY_NEIGH, b"")):
            found.add(struct.unpack("=i", seen[_NETCONFA_IFINDEX])[0])
    return frozenset(
        name
        for index, name in socket.if_nameindex()
        if (index in found or _ALL_INTERFACES in found) and _NAME.fullmatch(name)
    )


def occupied(ranges: Collection[str], addresses: Collection[NodeAddress]) -> Occupied:
    """The addresses and networks that can be no VIPs on this node.

    An address of the node can be none, unless somebody has put a VIP there, as kube-proxy's IPVS mode and
    NodeLocal DNSCache do: on an interface without a network, and nothing that the node is known by.

    Args:
        ranges: CIDRs in which neighbours are looked for, apart from those in the networks.
        addresses: as `node_addresses` gives them.

    Raises:
        OSError: netlink failed.
    """
    found: dict[str, str] = {}
    primary = {address.ip for address in addresses if address.primary}
    with Netlink() as netlink:
        own = list(interface_addresses(netlink))
        neighbours = list(_neighbours(netlink))
    networks = {one.network: one.interface for one in own if not one.lonely and not _is_alone(one)}
    wanted = [ipaddress.ip_network(cidr, strict=False) for cidr in ranges]
    for ip, index in neighbours:
        if any(ipaddress.ip_address(ip) in network for network in wanted):
            found[ip] = f"a neighbour's, at {_name(index)}"
    for ip, index in _next_hops():
        found[ip] = f"a next hop of this node, at {_name(index)}"
    with_network = {one.interface for one in own if not _is_alone(one)}
    for one in own:
        if not ipaddress.ip_address(one.ip).is_loopback and (
            one.ip in primary or one.interface in with_network
        ):
            found[one.ip] = f"an address of this node, at {one.interface}"
    return Occupied(addresses=tuple(sorted(found.items())), networks=tuple(sorted(networks.items())))


def _is_alone(address: InterfaceAddress) -> bool:
    """Whether nothing but the address itself is reached because of it; so it is with loopback addresses."""
    single = f"{address.ip}/{128 if ':' in address.ip else 32}"
    return address.network == single or ipaddress.ip_address(address.ip).is_loopback


def _neighbours(netlink: Netlink) -> Iterator[tuple[str, int]]:
    """Addresses and interface indexes of the hosts that the kernel knows on its links."""
    for message in netlink.dump(Message(RTM_GETNEIGH, _NEIGHBOUR.pack(socket.AF_UNSPEC, 0, 0, 0, 0))):
        family, index, state, _, _ = _NEIGHBOUR.unpack_from(message.body)
        address = attributes(message.body, _NEIGHBOUR.size).get(_NDA_DST)
        if address and state & _NUD_VALID and family in (socket.AF_INET, socket.AF_INET6):
            yield unpacked(address), index


def _next_hops() -> Iterator[tuple[str, int]]:
    """Addresses and interface indexes of the next hops of routes in the main table."""
    for family in (socket.AF_INET, socket.AF_INET6):
        body = ROUTE.pack(family, 0, 0, 0, _RT_TABLE_MAIN, 0, 0, 0, 0)
        with Netlink() as netlink:
            try:
                messages = netlink.dump(
                    Message(RTM_GETROUTE, body + attribute(RTA_TABLE, u32(_RT_TABLE_MAIN))), _MAX_ROUTES
                )
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):  # no such table
                    continue
                raise
        for message in messages:
            seen = attributes(message.body, ROUTE.size)
            if RTA_GATEWAY in seen and RTA_OIF in seen:
                yield unpacked(seen[RTA_GATEWAY]), int.from_bytes(seen[RTA_OIF], sys.byteorder)
            yield from _of_multipath(seen.get(RTA_MULTIPATH, b""))


def _of_multipath(data: bytes) -> Iterator[tuple[str, int]]:
    offset = 0
    while offset + _NEXTHOP.size <= len(data):
        length, _, _, index = _NEXTHOP.unpack_from(data, offset)
        if length < _NEXTHOP.size:
            return
        gateway = attributes(data[: offset + length], offset + _NEXTHOP.size).get(RTA_GATEWAY)
        if gateway:
            yield unpacked(gateway), index
        offset += (length + 3) & ~3


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # it has just gone
        return f"interface {index}"
