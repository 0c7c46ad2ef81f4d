"""The node's own addresses."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from proxyd.host.fib import route_to
from proxyd.host.netlink import RTM_GETADDR, RTM_GETLINK, Message, Netlink, attributes
from proxyd.state.snapshot import NodeAddress

# linux/if_addr.h
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface index
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_DADFAILED, _IFA_F_TENTATIVE = 0x08, 0x40
_RT_SCOPE_UNIVERSE = 0
# linux/if_link.h
_LINK = struct.Struct("=BBHiII")  # family, padding, type, index, flags, changed flags
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_KIND = 3, 18, 1
_DUMMY = "dummy"
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8

# No host may have these addresses (RFC 7600, RFC 6666), so only a default route leads to them. The kernel is
# asked for its route to them; nothing is sent.
_ELSEWHERE = {4: "192.0.0.8", 6: "100::1"}


class InterfaceAddress(NamedTuple):
    """An address of an interface that is up.

    Attributes:
        ip: in canonical form.
        interface: its name.
        network: the CIDR of the addresses that are reached through the interface because of it; of a
            point-to-point link the peer's.
        usual: it is global, and not on a loopback interface.
        lonely: nobody else is on the link: a loopback interface, or one of type dummy.
    """

    ip: str
    interface: str
    network: str
    usual: bool
    lonely: bool


def node_addresses() -> tuple[NodeAddress, ...]:
    """The addresses of interfaces that are up, in the kernel's order, each once.

    IPv6 link-local addresses are left out, and so are IPv6 addresses that are not verified yet or are
    duplicates. VIPs that a route makes local are not among them. For each family one address is `primary`:
    the source that the default route prefers, or else the first global one not on a loopback interface.

    Raises:
        OSError: netlink failed.
    """
    with Netlink() as netlink:
        found: dict[str, InterfaceAddress] = {}
        for address in interface_addresses(netlink):
            found.setdefault(address.ip, address)
        primaries = {_primary(netlink, version, found) for version in (4, 6)}
    return tuple(
        NodeAddress(ip=ip, interface=address.interface, primary=ip in primaries)
        for ip, address in found.items()
    )


def interface_addresses(netlink: Netlink) -> Iterator[InterfaceAddress]:
    """The addresses of `node_addresses` in the kernel's order; one may come more than once.

    Raises:
        OSError: netlink failed.
    """
    links = _links(netlink)
    for message in netlink.dump(Message(RTM_GETADDR, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))):
        family, prefix, flags, scope, index = _ADDRESS.unpack_from(message.body)
        seen = attributes(message.body, _ADDRESS.size)
        if _IFA_FLAGS in seen:
            flags = struct.unpack("=I", seen[_IFA_FLAGS])[0]
        # On a point-to-point link ADDRESS is the peer's.
        peer = seen.get(_IFA_ADDRESS, b"")
        raw = seen.get(_IFA_LOCAL) or peer
        link = links.get(index)
        if not raw or family not in (socket.AF_INET, socket.AF_INET6) or link is None:
            continue
        if not link.flags & _IFF_UP:
            continue
        if family == socket.AF_INET6 and flags & (_IFA_F_TENTATIVE | _IFA_F_DADFAILED):
            continue
        ip = ipaddress.ip_address(raw)
        if ip.version == 6 and ip.is_link_local:
            continue
        loopback = bool(link.flags & _IFF_LOOPBACK)
        yield InterfaceAddress(
            ip=str(ip),
            interface=link.name,
            network=str(ipaddress.ip_network((peer or raw, prefix), strict=False)),
            usual=scope == _RT_SCOPE_UNIVERSE and not loopback and not ip.is_loopback,
            lonely=loopback or link.kind == _DUMMY,
        )


class _Link(NamedTuple):
    name: str
    flags: int
    kind: str  # "" of hardware


def _links(netlink: Netlink) -> dict[int, _Link]:
    found = {}
    for message in netlink.dump(Message(RTM_GETLINK, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0))):
        _, _, _, index, flags, _ = _LINK.unpack_from(message.body)
        seen = attributes(message.body, _LINK.size)
        kind = attributes(seen.get(_IFLA_LINKINFO, b""), 0).get(_IFLA_INFO_KIND, b"")
        found[index] = _Link(_text(seen.get(_IFLA_IFNAME, b"")), flags, _text(kind))
    return found


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "replace")


def _primary(netlink: Netlink, version: int, found: Mapping[str, InterfaceAddress]) -> str:
    choice = route_to(netlink, _ELSEWHERE[version])
    if choice is not None and choice.source is not None and choice.source in found:
        return choice.source
    usual = (ip for ip, address in found.items() if address.usual and (":" in ip) == (version == 6))
    return next(usual, "")


def link_names() -> frozenset[str]:
    """The names of all interfaces.

    Raises:
        OSError: netlink failed.
    """
    with Netlink() as netlink:
        return frozenset(link.name for link in _links(netlink).values())
