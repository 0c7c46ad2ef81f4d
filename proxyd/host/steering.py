"""Takes single ports of addresses that are not the node's own: externalIPs and load-balancer IPs of others.

Of such an address the node takes (address, protocol, port) and nothing else; all its other ports are routed
as before. What is taken is led to a routing table of proxyd's own, in which the address is local:

    table 7112: local IP dev lo

Answers leave from the address, because the listener is bound transparently. Marks lead there (see
marking.py), and where they can't be used a policy rule for each port (see port_rules.py). Fragments of a
datagram after the first have no port; while a UDP port is steered they are put together before routing (see
fragments.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from proxyd.api.service import Protocol
from proxyd.host import fragments
from proxyd.host.fib import local_routes
from proxyd.host.fragments import Fragments
from proxyd.host.marking import NFT_TABLE, Marks, Unusable
from proxyd.host.netlink import Netlink
from proxyd.host.policy_rules import LAST_TABLE, TABLE, RouteTable, own_rules, rule_of_port
from proxyd.host.port_rules import ports_present, steer_ports
from proxyd.state.marks import DEFAULT_MARK
from proxyd.state.spec import ListenerKey
from proxyd.state.spec import Steering as Action

_BY_PORT = (
    "foreign addresses are taken by a policy rule for each port, which slows down what the node forwards, "
    "and clients may not be refused at once"
)
_NOT_REMOVED = "the nft table can't be removed"


class Steering:
    """What is steered on this node. The kernel is the record: nothing else has to survive.

    Args:
        mark: the bit of a packet's mark that is used.
    """

    def __init__(self, mark: int = DEFAULT_MARK) -> None:
        self._marks = Marks(mark)
        self._fragments = Fragments()
        self._no_marks = ""
        self._no_fragments = ""
        # What the last `sync` has made: what its rules do, and the addresses with a route.
        self._rules: frozenset[tuple[object, ...]] = frozenset()
        self._routed: frozenset[str] = frozenset()

    @property
    def tables(self) -> tuple[str, ...]:
        """The nft tables that there are, as far as is known."""
        made = ((NFT_TABLE, self._marks.made), (fragments.TABLE, self._fragments.made))
        return tuple(table for table, is_made in made if is_made)

    @property
    def trouble(self) -> str:
        """One line, what does not work as it should and why; "" where all does."""
        return "; ".join(filter(None, (self._no_marks, self._marks.trouble, self._no_fragments)))

    def present(self) -> dict[ListenerKey, Action]:
        """What is steered now, whichever process began it.

        Raises:
            OSError: netlink failed.
        """
        with Netlink() as netlink:
            found = ports_present(netlink)
        # Where nftables can't be used there is no table.
        with contextlib.suppress(OSError):
            found |= self._marks.present()
        return found

    def lost(self) -> str:
        """What is gone of the rules and routes that the last `sync` made: "2 policy rules"; "" if nothing is.

        Raises:
            OSError: netlink failed.
        """
        if not (self._rules or self._routed):
            return ""
        with Netlink() as netlink:
            rules = self._rules.difference(rule.what for rule in own_rules(netlink))
            routes = self._routed.difference(route.ip for route in local_routes(netlink, TABLE))
        counts = ((len(rules), "policy rule{}"), (len(routes), f"route{{}} of table {TABLE}"))
        return " and ".join(
            f"{count} {what.format('s' if count > 1 else '')}" for count, what in counts if count
        )

    def forget(self) -> None:
        """Have the next `sync` look at what it otherwise believes to be there."""
        self._fragments.forget()

    def sync(
        self, wanted: Mapping[ListenerKey, Action], refused_too: AbstractSet[ListenerKey] = frozenset()
    ) -> dict[ListenerKey, str]:
        """Steer these ports, and no others. What somebody else changed is repaired.

        What leads a packet here is made before what led it here goes, so that in between none is routed to
        the foreign host. A listener must be open before its key becomes LOCAL. No listener may be open at an
        UNREACHABLE one.

        Args:
            wanted: what becomes of the traffic to each port.
            refused_too: LOCAL ones whose listener is closed while its relays live on. New clients are refused
                there: they would hang, as the kernel can't answer from an address that is not its own.

        Returns:
            One line for each key that failed. See also `trouble`.
        """
        try:
            with Netlink() as netlink:
                failed = self._sync(netlink, wanted, refused_too)
        except OSError as error:
            failed = {key: f"cannot steer {key}: {error.strerror or error}" for key in wanted}
        udp = any(
            key.protocol is Protocol.UDP and how is Action.LOCAL and key not in failed
            for key, how in wanted.items()
        )
        reason = self._fragments.sync(wanted=udp)
        self._no_fragments = (
            f"UDP datagrams in fragments to foreign addresses are lost: {reason}" if reason else ""
        )
        return failed

    def _sync(
        self, netlink: Netlink, wanted: Mapping[ListenerKey, Action], refused_too: AbstractSet[ListenerKey]
    ) -> dict[ListenerKey, str]:
        ips = frozenset(key.ip for key in wanted)
        routes, last = RouteTable(netlink, TABLE), RouteTable(netlink, LAST_TABLE)
        try:
            failed = self._marks.sync(netlink, routes, last, wanted, refused_too)
        except Unusable as error:
            self._no_marks = f"{_BY_PORT if wanted else _NOT_REMOVED}: {error}"
            failed = steer_ports(netlink, routes, wanted)
            self._rules = frozenset(
                rule_of_port(key, how).what for key, how in wanted.items() if key not in failed
            )
            self._marks.leave(netlink)
            last.keep()
        else:
            self._no_marks = ""
            self._rules = self._marks.needed
            failed |= steer_ports(netlink, routes, {})
            # Earlier ones had a source, and would go with that address.
            routes.add(dict.fromkeys(ips.difference(key.ip for key in failed)))
            last.keep(ips)
        routes.keep(ips)
        self._routed = frozenset(
            key.ip
            for key, how in wanted.items()
            if key not in failed and (how is Action.LOCAL or not self._no_marks)
        )
        return failed
