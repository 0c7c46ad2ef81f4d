"""Policy rules that take single ports of addresses that are not the node's own.

Of an externalIP or load-balancer IP the node takes (address, protocol, port) and nothing else:

    ip rule: priority 112, to IP ipproto tcp dport PORT, lookup 7112, protocol 112
    table 7112: local IP dev lo src <an address of the node>, protocol 112

All other ports of IP are routed as before. `src` matters only to connections that the node itself opens:
without it they would come from IP, and the answers of IP's other ports would be routed to the foreign host. A
packet from a pod or from outside has its own source, which no route changes. Answers leave from IP, because
the listener is bound transparently.

Where there is no endpoint the rule is an `unreachable` one, and if nftables can be used new clients are
refused before routing (see refusal.py).

The kernel walks the list of rules for every packet that is not local: that is right for tens of addresses. It
needs Linux 4.17 and CAP_NET_ADMIN. The fragments of a datagram after the first have no port; while a UDP port
is steered they are reassembled before routing (see fragments.py).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Mapping

from proxyd.api.service import Protocol
from proxyd.host.addresses import node_addresses
from proxyd.host.fib import ROUTE_PROTOCOL, local_route, local_routes
from proxyd.host.fragments import Fragments
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
from proxyd.host.refusal import Refusal
from proxyd.state.spec import ListenerKey
from proxyd.state.spec import Steering as Action

# The rules come after that of table `local` (0), and before those of network plug-ins and `main` (32766).
RULE_PRIORITY = 112
STEERING_TABLE = 7112

# linux/fib_rules.h
_RULE = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, -, -, action, flags
_FRA_DST, _FRA_PRIORITY, _FRA_TABLE, _FRA_PROTOCOL, _FRA_IP_PROTO, _FRA_DPORT_RANGE = 1, 6, 15, 21, 22, 24
_ACTIONS = {Action.LOCAL: 1, Action.UNREACHABLE: 7}  # FR_ACT_TO_TBL, FR_ACT_UNREACHABLE
_NUMBERS = {
    Protocol.TCP: socket.IPPROTO_TCP,
    Protocol.UDP: socket.IPPROTO_UDP,
    Protocol.SCTP: socket.IPPROTO_SCTP,
}
_STEERINGS = {number: steering for steering, number in _ACTIONS.items()}
_PROTOCOLS = {number: protocol for protocol, number in _NUMBERS.items()}
_GONE = frozenset({errno.ESRCH, errno.ENOENT})

_Rule = tuple[ListenerKey, Action]


class Steering:
    """The policy rules of this node. It keeps no record of them: the kernel's rules are the record."""

    def __init__(self) -> None:
        self._troubles: dict[str, str] = {}
        self._fragments = Fragments()
        self._refusal = Refusal()
        self._refused_too: frozenset[ListenerKey] = frozenset()

    @property
    def trouble(self) -> str:
        """What does not work, in one line; "" if all does.

        Clients without an endpoint may get an ICMP error or silence in place of a refusal, fragmented
        datagrams may be lost, or `refuse_new` and `refresh` could not read the rules.
        """
        return "; ".join(text for text in self._troubles.values() if text)

    def present(self) -> dict[ListenerKey, Action]:
        """What proxyd's rules do now, whichever process made them. For two rules of a key the first counts.

        Raises:
            OSError: netlink failed.
        """
        with Netlink() as netlink:
            return _effective(_rules(netlink))

    def set(self, wanted: Mapping[ListenerKey, Action]) -> dict[ListenerKey, str]:
        """Put rules in force; other keys keep theirs.

        The new rule of a key is made before the old one is deleted, so its traffic is never routed to the
        foreign host. Bind the listener before setting LOCAL, and set UNREACHABLE before closing it. Routes of
        LOCAL keys are made anew if they are missing, or if their source is gone.

        Returns:
            One line for each key that failed.
        """
        try:
            with Netlink() as netlink:
                # Refused may be only what no rule delivers, also if this process dies in between.
                self._refuse(_unreachable(netlink).difference(wanted))
                failed = _set(netlink, wanted)
                self._refuse(_unreachable(netlink))
                self._reassemble(netlink)
                return failed
        except OSError as error:
            return {key: f"cannot steer {key}: {error.strerror or error}" for key in wanted}

    def remove(self, keys: Iterable[ListenerKey]) -> dict[ListenerKey, str]:
        """Remove rules, and the routes of addresses that no rule needs any more.

        Returns:
            One line for each key that failed. A rule that is gone already is no failure.
        """
        keys = list(keys)
        try:
            with Netlink() as netlink:
                doomed = set(keys)
                self._refused_too -= doomed
                self._refuse(_unreachable(netlink) - doomed)
                failed = _delete(netlink, [rule for rule in _rules(netlink) if rule[0] in doomed])
                _drop_unused_routes(netlink)
                self._reassemble(netlink)
                return failed
        except OSError as error:
            return {key: f"cannot stop steering {key}: {error.strerror or error}" for key in keys}

    def refuse_new(self, keys: frozenset[ListenerKey]) -> None:
        """Refuse new clients of these LOCAL keys alone: their listeners are closed while relays live on.

        New clients would hang else, as the kernel cannot answer from an address that is not its own. The
        next call replaces these keys. UNREACHABLE ones are refused in any case. For failures see `trouble`.
        """
        self._refused_too = keys
        try:
            with Netlink() as netlink:
                self._refuse(_unreachable(netlink))
                self._reassemble(netlink)
        except OSError as error:
            self._troubles["read"] = f"cannot read the policy rules: {error.strerror or error}"

    def _refuse(self, unreachable: frozenset[ListenerKey]) -> None:
        self._troubles["read"] = ""
        self._troubles["refusal"] = self._refusal.sync(unreachable | self._refused_too) or ""

    def _reassemble(self, netlink: Netlink) -> None:
        present = _effective(_rules(netlink)).items()
        steered = any(key.protocol is Protocol.UDP and action is Action.LOCAL for key, action in present)
        reason = self._fragments.sync(wanted=steered)
        lost = f"UDP datagrams in fragments to foreign addresses are lost: {reason}"
        self._troubles["fragments"] = lost if reason else ""

    def refresh(self) -> dict[ListenerKey, str]:
        """Repair the routes of all LOCAL rules; to be called when the node's addresses have changed.

        The kernel deletes a route when its source address goes away. Without it the node's own connections
        are lost, and those of others are routed to the foreign host.

        Returns:
            One line for each key whose route could not be made; see also `trouble`.
        """
        try:
            with Netlink() as netlink:
                present = _effective(_rules(netlink))
                local = {key for key, steering in present.items() if steering is Action.LOCAL}
                failed = _make_routes(netlink, {key.ip for key in local}) if local else {}
        except OSError as error:
            self._troubles["read"] = f"cannot read the policy rules: {error.strerror or error}"
            return {}
        return {key: f"cannot steer {key}: {failed[key.ip]}" for key in local if key.ip in failed}


def steering_routes() -> list[str]:
    """The addresses that have a route in proxyd's table.

    Raises:
        OSError: netlink failed.
    """
    with Netlink() as netlink:
        return [route.ip for route in local_routes(netlink, STEERING_TABLE)]


def _set(netlink: Netlink, wanted: Mapping[ListenerKey, Action]) -> dict[ListenerKey, str]:
    failed: dict[ListenerKey, str] = {}
    messages: dict[ListenerKey, Message] = {}
    for key, steering in wanted.items():
        try:
            messages[key] = _rule(key, steering, RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL)
        except ValueError as error:
            failed[key] = f"cannot steer {key}: {error}"
    local = {key.ip for key in messages if wanted[key] is Action.LOCAL}
    no_route = _make_routes(netlink, local) if local else {}
    for key in [key for key in messages if key.ip in no_route and wanted[key] is Action.LOCAL]:
        failed[key] = f"cannot steer {key}: {no_route[key.ip]}"
        del messages[key]
    for key, failure in zip(messages, netlink.batch(list(messages.values())), strict=True):
        if failure is not None and failure.errno != errno.EEXIST:
            failed[key] = f"cannot steer {key}: {failure.text}"
    done = {key: steering for key, steering in wanted.items() if key not in failed}
    old = [(key, steering) for key, steering in _rules(netlink) if done.get(key, steering) is not steering]
    failed |= _delete(netlink, old)
    if old:
        _drop_unused_routes(netlink)
    return failed


def _unreachable(netlink: Netlink) -> frozenset[ListenerKey]:
    present = _effective(_rules(netlink))
    return frozenset(key for key, steering in present.items() if steering is Action.UNREACHABLE)


def _effective(rules: list[_Rule]) -> dict[ListenerKey, Action]:
    found: dict[ListenerKey, Action] = {}
    for key, steering in rules:
        found.setdefault(key, steering)
    return found


def _rules(netlink: Netlink) -> list[_Rule]:
    """Proxyd's rules in the kernel's order."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            messages = netlink.dump(Message(RTM_GETRULE, _RULE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)))
        except OSError as error:
            if error.errno in (
                errno.EOPNOTSUPP,
                errno.EAFNOSUPPORT,
            ):  # there are no policy rules for this family
                continue
            raise
        for message in messages:
            header = _RULE.unpack_from(message.body)
            seen = attributes(message.body, _RULE.size)
            # Proxyd's rules have its priority and its protocol number.
            if (
                header[0] != family
                or seen.get(_FRA_PROTOCOL) != bytes([ROUTE_PROTOCOL])
                or seen.get(_FRA_PRIORITY) != u32(RULE_PRIORITY)
                or header[7] not in _STEERINGS
                or not {_FRA_DST, _FRA_IP_PROTO, _FRA_DPORT_RANGE} <= seen.keys()
            ):
                continue
            protocol = _PROTOCOLS.get(seen[_FRA_IP_PROTO][0])
            first, last = struct.unpack("=HH", seen[_FRA_DPORT_RANGE])
            if protocol is not None and first == last:
                key = ListenerKey(unpacked(seen[_FRA_DST]), first, protocol)
                found.append((key, _STEERINGS[header[7]]))
    return found


def _rule(key: ListenerKey, steering: Action, kind: int, flags: int = 0) -> Message:
    family, address = packed(key.ip)
    if not 0 < key.port < 1 << 16:
        raise ValueError(f"{key.port} is not a port")
    body = [
        _RULE.pack(family, 8 * len(address), 0, 0, 0, 0, 0, _ACTIONS[steering], 0),
        attribute(_FRA_DST, address),
        attribute(_FRA_PRIORITY, u32(RULE_PRIORITY)),
        attribute(_FRA_PROTOCOL, bytes([ROUTE_PROTOCOL])),
        attribute(_FRA_IP_PROTO, bytes([_NUMBERS[key.protocol]])),
        attribute(_FRA_DPORT_RANGE, struct.pack("=HH", key.port, key.port)),
    ]
    if steering is Action.LOCAL:
        body.append(attribute(_FRA_TABLE, u32(STEERING_TABLE)))
    return Message(kind, b"".join(body), flags)


def _delete(netlink: Netlink, rules: list[_Rule]) -> dict[ListenerKey, str]:
    results = netlink.batch([_rule(key, steering, RTM_DELRULE) for key, steering in rules])
    return {
        key: f"cannot stop steering {key}: {failure.text}"
        for (key, _), failure in zip(rules, results, strict=True)
        if failure is not None and failure.errno not in _GONE
    }


def _make_routes(netlink: Netlink, ips: set[str]) -> dict[str, str]:
    own = node_addresses()
    sources: dict[int, list[str]] = {4: [], 6: []}
    for address in sorted(own, key=lambda address: not address.primary):
        if address.interface != "lo" and not address.ip.startswith("127."):
            sources[6 if ":" in address.ip else 4].append(address.ip)
    have = {route.ip: route.source for route in local_routes(netlink, STEERING_TABLE)}
    missing: list[tuple[str, str]] = []
    for ip in sorted(ips):
        version = 6 if ":" in ip else 4
        usable = sources[version] or ["127.0.0.1" if version == 4 else "::1"]
        if have.get(ip) != usable[0]:
            missing.append((ip, usable[0]))
    results: list[Failure | None] = netlink.batch(
        [
            local_route(ip, STEERING_TABLE, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, source)
            for ip, source in missing
        ]
    )
    return {
        ip: failure.text for (ip, _), failure in zip(missing, results, strict=True) if failure is not None
    }


def _drop_unused_routes(netlink: Netlink) -> None:
    needed = {key.ip for key, steering in _rules(netlink) if steering is Action.LOCAL}
    unused = [route.ip for route in local_routes(netlink, STEERING_TABLE) if route.ip not in needed]
    # A route that no rule leads to does no harm, and the next cleanup finds it.
    netlink.batch([local_route(ip, STEERING_TABLE, RTM_DELROUTE) for ip in unused])
