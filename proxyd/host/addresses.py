"""The node's own addresses."""

from __future__ import annotations

import ipaddress
import socket
import struct

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
_IFLA_IFNAME = 3
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8

# No host may have these addresses (RFC 7600, RFC 6666), so only a default route leads to them. The kernel is
# asked for its route to them; nothing is sent.
_ELSEWHERE = {4: "192.0.0.8", 6: "100::1"}


def node_addresses() -> tuple[NodeAddress, ...]:
    """The addresses of interfaces that are up, in the kernel's order, each once.

    IPv6 link-local addresses are left out, and so are IPv6 addresses that are not verified yet or are
    duplicates. VIPs that a route makes local are not among them. For each family one address is `primary`:
    the source that the default route prefers, or else the first global one not on a loopback interface.

    Raises:
        OSError: netlink failed.
    """
    with Netlink() as netlink:
        links = _links(netlink)
        found: dict[str, tuple[str, bool]] = {}  # by ip: interface, and whether it may be primary
        for message in netlink.dump(Message(RTM_GETADDR, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))):
            family, _, flags, scope, index = _ADDRESS.unpack_from(message.body)
            seen = attributes(message.body, _ADDRESS.size)
            if _IFA_FLAGS in seen:
                flags = struct.unpack("=I", seen[_IFA_FLAGS])[0]
            raw = seen.get(_IFA_LOCAL) or seen.get(
                _IFA_ADDRESS
            )  # on a point-to-point link ADDRESS is the peer's
            name, link_flags = links.get(index, ("", 0))
            if raw is None or family not in (socket.AF_INET, socket.AF_INET6) or not link_flags & _IFF_UP:
                continue
            if family == socket.AF_INET6 and flags & (_IFA_F_TENTATIVE | _IFA_F_DADFAILED):
                continue
            ip = ipaddress.ip_address(raw)
            if ip.version == 6 and ip.is_link_local:
                continue
            usual = scope == _RT_SCOPE_UNIVERSE and not link_flags & _IFF_LOOPBACK and not ip.is_loopback
            found.setdefault(str(ip), (name, usual))
        primaries = {_primary(netlink, version, found) for version in (4, 6)}
    return tuple(
        NodeAddress(ip=ip, interface=interface, primary=ip in primaries)
        for ip, (interface, _) in found.items()
    )


def _links(netlink: Netlink) -> dict[int, tuple[str, int]]:
    found = {}
    for message in netlink.dump(Message(RTM_GETLINK, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0))):
        _, _, _, index, flags, _ = _LINK.unpack_from(message.body)
        name = attributes(message.body, _LINK.size).get(_IFLA_IFNAME, b"")
        found[index] = (name.rstrip(b"\0").decode("utf-8", "replace"), flags)
    return found


def _primary(netlink: Netlink, version: int, found: dict[str, tuple[str, bool]]) -> str:
    choice = route_to(netlink, _ELSEWHERE[version])
    if choice is not None and choice.source is not None and choice.source in found:
        return choice.source
    return next((ip for ip, (_, usual) in found.items() if usual and (":" in ip) == (version == 6)), "")


def link_names() -> frozenset[str]:
    """The names of all interfaces.

    Raises:
        OSError: netlink failed.
    """
    with Netlink() as netlink:
        return frozenset(name for name, _ in _links(netlink).values())
