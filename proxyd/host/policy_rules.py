"""Makes the policy rules behind steering (`ip rule`), and the routing tables that they lead to, by netlink.

    table 7112 or 7113: local IP dev lo [src <an address of the node>], protocol 112

Rules and routes have the protocol number 112, by which what a killed process left is found.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from proxyd.api.service import Protocol
from proxyd.host.addresses import node_addresses
from proxyd.host.fib import ROUTE_PROTOCOL, local_route, local_routes
from proxyd.host.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_GETRULE,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    Failure,
    Message,
    Netlink,
    attribute,
    attributes,
    packed,
    u32,
    unpacked,
)
from proxyd.state.spec import ListenerKey
from proxyd.state.spec import Steering as Action

# After the table `local` (priority 0) and before those of network plug-ins and `main` (32766).
PRIORITY = 112
# After all tables of an ordinary node, `default` (32767) being the last.
LAST_PRIORITY = 33112
TABLE = 7112
LAST_TABLE = 7113

# linux/fib_rules.h
_HEADER = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, -, -, action, flags
_DST, _IIFNAME, _PRIORITY, _FWMARK, _TABLE, _FWMASK = 1, 3, 6, 10, 15, 16
_PROTOCOL, _IP_PROTO, _DPORT_RANGE = 21, 22, 24
_TO_TABLE, _UNREACHABLE = 1, 7  # FR_ACT_*
_ACTIONS = {Action.LOCAL: _TO_TABLE, Action.UNREACHABLE: _UNREACHABLE}
_STEERINGS = {number: steering for steering, number in _ACTIONS.items()}
_NUMBERS = {
    Protocol.TCP: socket.IPPROTO_TCP,
    Protocol.UDP: socket.IPPROTO_UDP,
    Protocol.SCTP: socket.IPPROTO_SCTP,
}
_PROTOCOLS = {number: protocol for protocol, number in _NUMBERS.items()}
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_GONE = frozenset({errno.ESRCH, errno.ENOENT})


class PolicyRule(NamedTuple):
    """One rule. `body` is its message's, which the kernel completes.

    Attributes:
        version: 4 or 6.
        key: of a rule for one port: whose traffic it concerns.
        action: of a rule for one port: what becomes of it.
        mark: of a rule for marked packets: the bit.
        last: a rule for the node's own connections to which no other table has a route.
    """

    body: bytes
    version: int
    key: ListenerKey | None = None
    action: Action | None = None
    mark: int = 0
    last: bool = False

    @property
    def what(self) -> tuple[object, ...]:
        """What it does: of two rules with the same the second has no effect."""
        return self[1:]


def rule_of_port(key: ListenerKey, action: Action) -> PolicyRule:
    """`to IP ipproto PROTOCOL dport PORT lookup 7112`, or `unreachable`.

    Raises:
        ValueError: not an address, or not a port.
    """
    family, address = packed(key.ip)
    if not 0 < key.port < 1 << 16:
        raise ValueError(f"{key.port} is not a port")
    body = [
        _HEADER.pack(family, 8 * len(address), 0, 0, 0, 0, 0, _ACTIONS[action], 0),
        attribute(_DST, address),
        attribute(_IP_PROTO, bytes([_NUMBERS[key.protocol]])),
        attribute(_DPORT_RANGE, struct.pack("=HH", key.port, key.port)),
        *_own(PRIORITY),
    ]
    if action is Action.LOCAL:
        body.append(attribute(_TABLE, u32(TABLE)))
    return PolicyRule(b"".join(body), 4 if family == socket.AF_INET else 6, key, action)


def rule_of_mark(version: int, bit: int) -> PolicyRule:
    """`fwmark BIT/BIT lookup 7112`."""
    body = [
        _HEADER.pack(_FAMILIES[version], 0, 0, 0, 0, 0, 0, _TO_TABLE, 0),
        attribute(_FWMARK, u32(bit)),
        attribute(_FWMASK, u32(bit)),
        attribute(_TABLE, u32(TABLE)),
        *_own(PRIORITY),
    ]
    return PolicyRule(b"".join(body), version, mark=bit)


def last_rule(version: int) -> PolicyRule:
    """`iif lo lookup 7113`, after all other tables."""
    body = [
        _HEADER.pack(_FAMILIES[version], 0, 0, 0, 0, 0, 0, _TO_TABLE, 0),
        attribute(_IIFNAME, b"lo\0"),
        attribute(_TABLE, u32(LAST_TABLE)),
        *_own(LAST_PRIORITY),
    ]
    return PolicyRule(b"".join(body), version, last=True)


def _own(priority: int) -> tuple[bytes, bytes]:
    return attribute(_PRIORITY, u32(priority)), attribute(_PROTOCOL, bytes([ROUTE_PROTOCOL]))


def own_rules(netlink: Netlink) -> list[PolicyRule]:
    """Proxyd's rules in the kernel's order, whichever process made them.

    Raises:
        OSError: netlink failed.
    """
    found = []
    for version, family in _FAMILIES.items():
        try:
            messages = netlink.dump(Message(RTM_GETRULE, _HEADER.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)))
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT):  # no policy rules for this family
                continue
            raise
        found += [rule for message in messages if (rule := _read(message.body, version, family))]
    return found


def _read(body: bytes, version: int, family: int) -> PolicyRule | None:
    header = _HEADER.unpack_from(body)
    seen = attributes(body, _HEADER.size)
    # The numbers of priority and protocol together are proxyd's mark.
    priority = struct.unpack("=I", seen[_PRIORITY])[0] if _PRIORITY in seen else 0
    own = priority in (PRIORITY, LAST_PRIORITY) and seen.get(_PROTOCOL) == bytes([ROUTE_PROTOCOL])
    if header[0] != family or not own:
        return None
    if priority == LAST_PRIORITY:
        return PolicyRule(body, version, last=True)
    if _FWMARK in seen:
        return PolicyRule(body, version, mark=struct.unpack("=I", seen[_FWMARK])[0])
    if header[7] not in _STEERINGS or not {_DST, _IP_PROTO, _DPORT_RANGE} <= seen.keys():
        return None
    protocol = _PROTOCOLS.get(seen[_IP_PROTO][0])
    first, last = struct.unpack("=HH", seen[_DPORT_RANGE])
    if protocol is None or first != last:
        return None
    key = ListenerKey(unpacked(seen[_DST]), first, protocol)
    return PolicyRule(body, version, key, _STEERINGS[header[7]])


def add_rules(netlink: Netlink, rules: Iterable[PolicyRule]) -> dict[PolicyRule, Failure]:
    """Make rules; one that is there already is no failure.

    Returns:
        Those that failed.
    """
    rules = list(rules)
    made = netlink.batch([Message(RTM_NEWRULE, rule.body, NLM_F_CREATE | NLM_F_EXCL) for rule in rules])
    return {
        rule: failure
        for rule, failure in zip(rules, made, strict=True)
        if failure is not None and failure.errno != errno.EEXIST
    }


def delete_rules(netlink: Netlink, rules: Iterable[PolicyRule]) -> dict[PolicyRule, Failure]:
    """Take rules away; one that is gone already is no failure.

    Returns:
        Those that failed.
    """
    rules = list(rules)
    gone = netlink.batch([Message(RTM_DELRULE, rule.body) for rule in rules])
    return {
        rule: failure
        for rule, failure in zip(rules, gone, strict=True)
        if failure is not None and failure.errno not in _GONE
    }


def sources(ips: Iterable[str]) -> dict[str, str | None]:
    """For each address, an address of the node from which connections to it may come.

    Raises:
        OSError: netlink failed.
    """
    own = [one for one in node_addresses() if one.interface != "lo" and not one.ip.startswith("127.")]
    own.sort(key=lambda one: not one.primary)
    found: dict[str, str | None] = {}
    for ip in ips:
        of_family = (one.ip for one in own if (":" in one.ip) == (":" in ip))
        found[ip] = next(of_family, "::1" if ":" in ip else "127.0.0.1")
    return found


class RouteTable:
    """One of the tables, read once.

    Args:
        netlink: of rtnetlink.
        number: of the table.

    Raises:
        OSError: netlink failed.
    """

    def __init__(self, netlink: Netlink, number: int) -> None:
        self._netlink = netlink
        self._number = number
        self._sources = {route.ip: route.source for route in local_routes(netlink, number)}

    def add(self, wanted: Mapping[str, str | None], *, replace: bool = True) -> dict[str, str]:
        """Have the table deliver addresses here.

        Args:
            wanted: by address, where the node's own connections to it come from; None: the kernel's choice.
            replace: whether routes with another source are changed.

        Returns:
            For each address that failed, why.
        """
        new = {
            ip: source
            for ip, source in wanted.items()
            if ip not in self._sources or (replace and self._sources[ip] != source)
        }
        flags = NLM_F_CREATE | NLM_F_REPLACE
        made = self._netlink.batch(
            [local_route(ip, self._number, RTM_NEWROUTE, flags, source) for ip, source in new.items()]
        )
        failed = {ip: failure.text for ip, failure in zip(new, made, strict=True) if failure is not None}
        self._sources |= {ip: source for ip, source in new.items() if ip not in failed}
        return failed

    def keep(self, needed: AbstractSet[str] = frozenset()) -> None:
        """Take away the routes but for these addresses. No rule leads to the others."""
        unused = self._sources.keys() - needed
        self._netlink.batch([local_route(ip, self._number, RTM_DELROUTE) for ip in unused])


def steering_routes() -> list[str]:
    """Addresses that have a route in one of proxyd's tables, for each such route once.

    Raises:
        OSError: netlink failed.
    """
    with Netlink() as netlink:
        return [route.ip for table in (TABLE, LAST_TABLE) for route in local_routes(netlink, table)]
