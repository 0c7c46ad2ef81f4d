"""Makes VIPs local by host-scope routes: `local VIP dev lo table local proto 112`.

With such a route the kernel delivers the VIP's packets on this node, and a listener can bind it. The route
has no source address. Over IPv4 the node's own connections to the VIP then come from the VIP itself, which
the node always reaches; the kernel would delete a route with `src` together with the address that `src`
names. Over IPv6 the kernel chooses an address of the node.

It needs CAP_NET_ADMIN.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from proxyd.host.addresses import node_addresses
from proxyd.host.fib import ROUTE_PROTOCOL, RT_TABLE_LOCAL, RTN_LOCAL, local_route, local_routes, route_to
from proxyd.host.netlink import NLM_F_CREATE, NLM_F_EXCL, RTM_DELROUTE, RTM_NEWROUTE, Message, Netlink

__all__ = ["ROUTE_PROTOCOL", "VipRoutes"]

# The errors of removing a route that does not exist.
_GONE = frozenset({errno.ESRCH, errno.ENOENT, errno.ENODEV})


class VipRoutes:
    """The VIPs of this node. It keeps no record: the kernel's table is the record."""

    def present(self) -> frozenset[str]:
        """The VIPs whose routes have proxyd's protocol number, whichever process made them.

        Raises:
            OSError: netlink failed.
        """
        with Netlink() as netlink:
            return frozenset(route.ip for route in local_routes(netlink, RT_TABLE_LOCAL))

    def add(self, ips: Iterable[str]) -> dict[str, str]:
        """Make addresses local. One that is local already, by a route or as the node's own, stays as it is.

        Returns:
            One line for each address that failed.
        """
        try:
            own = {address.ip for address in node_addresses()}
        except OSError as error:
            return {ip: f"cannot make {ip} local: {error.strerror or error}" for ip in ips}
        wanted = [ip for ip in ips if ip not in own]
        return _apply(
            wanted, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, frozenset({errno.EEXIST}), "make {ip} local"
        )

    def remove(self, ips: Iterable[str]) -> dict[str, str]:
        """Remove routes that `add` made, and no others. A route that is gone already is no failure.

        Returns:
            One line for each address that failed.
        """
        return _apply(list(ips), RTM_DELROUTE, 0, _GONE, "remove the route of {ip}")


def _apply(ips: list[str], kind: int, flags: int, harmless: frozenset[int], what: str) -> dict[str, str]:
    failed: dict[str, str] = {}
    messages: list[Message] = []
    accepted: list[str] = []
    for ip in ips:
        try:
            messages.append(local_route(ip, RT_TABLE_LOCAL, kind, flags))
        except ValueError as error:
            failed[ip] = f"cannot {what.format(ip=ip)}: {error}"
        else:
            accepted.append(ip)
    if not messages:
        return failed
    try:
        with Netlink() as netlink:
            results = netlink.batch(messages)
    except OSError as error:
        return failed | {ip: f"cannot {what.format(ip=ip)}: {error.strerror or error}" for ip in accepted}
    for ip, failure in zip(accepted, results, strict=True):
        if failure is None or failure.errno in harmless:
            continue
        text = failure.text
        if failure.errno == errno.ENETDOWN:
            text += ": the interface `lo` is down; `ip link set lo up`"
        elif failure.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP) and ":" in ip:
            text += ": this kernel has no IPv6"
        failed[ip] = f"cannot {what.format(ip=ip)}: {text}"
    return failed


def is_local(ip: str) -> bool:
    """Whether packets to an address are delivered on this node, by a VIP route or as one of its own.

    Raises:
        OSError: netlink failed.
        ValueError: `ip` is not an address.
    """
    with Netlink() as netlink:
        choice = route_to(netlink, ip)
    return choice is not None and choice.kind == RTN_LOCAL
