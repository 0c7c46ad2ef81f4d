"""Steers by a mark: an nftables table marks what is for steered ports, and one policy rule takes all of it.

    nft table `proxyd-steering`: of what goes to a steered address and port, set the bit 0x1000 of the mark
    ip rule: priority 112, fwmark 0x1000/0x1000, lookup 7112

However many ports are steered, a packet that the node forwards costs one look into a set of addresses.

- ICMP errors have no port. Those that belong to a transparent socket, as proxyd's are, are marked too:
  without them no router could tell of a smaller MTU.
- The node's own packets are marked in `output`. Those of proxyd's own connections to endpoints are not, or an
  endpoint that is itself a steered address and port would never be reached. They are known by the priority
  that workers give their sockets. An IPv4 socket that has it because of its DSCP is somebody else's.
- Where the node has no route to an address, its own clients would be told so before any packet is made. For
  them there is a rule after all other tables. That it does not open the node's own ports at that address is
  seen to in `output`.
- Ports that are to be refused (no endpoint, or a closed listener whose relays live on) answer as closed ones.
  A policy rule of type `unreachable` is no refusal: over IPv6 and UDP clients take its ICMP error for
  something that will pass, and the kernel sends few of them.
- The bit is taken away where a packet is delivered, so that nobody else sees it there.

Needs `nft`, CAP_NET_ADMIN and Linux 5.9.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from proxyd.host.netlink import Netlink, unpacked
from proxyd.host.nft import (
    delete_table,
    elements,
    generation,
    members_of,
    port,
    port_of,
    rules_of,
    run,
    table_exists,
)
from proxyd.host.policy_rules import (
    RouteTable,
    add_rules,
    delete_rules,
    last_rule,
    own_rules,
    rule_of_mark,
    sources,
)
from proxyd.state.marks import DEFAULT_MARK, OWN_PRIORITY
from proxyd.state.spec import ListenerKey
from proxyd.state.spec import Steering as Action

NFT_TABLE = "proxyd-steering"
# Earlier versions refused in a table of its own.
EARLIER_NFT_TABLE = "proxyd-refusal"

# After address translation (-100), and after everybody's mangling (-150), which may replace the whole mark.
_MARKING = -99
_FIRST = -310  # of those who look at marks

_CHAINS = f"""
  chain refuse {{{{
    tcp flags & (fin | syn | rst | ack) == syn reject with tcp reset
    meta l4proto 6 return
    reject with icmpx type port-unreachable
  }}}}
  chain prerouting {{{{
    type filter hook prerouting priority {_MARKING}; policy accept;
    ip daddr @ips4 goto to4
    ip6 daddr @ips6 goto to6
  }}}}
  chain output {{{{
    type route hook output priority {_MARKING}; policy accept;
    ip daddr @ips4 goto from4
    ip6 daddr @ips6 goto from6
  }}}}
  chain nowhere {{{{
    oif != lo accept
    meta l4proto 6 reject with tcp reset
    reject with icmpx type no-route
  }}}}
  chain input {{{{
    type filter hook input priority {_FIRST}; policy accept;
    meta mark & {{bit}} == {{bit}} meta mark set meta mark & {{others}}
  }}}}
"""
# For each address family.
_FAMILY_CHAINS = f"""
  set ips{{n}} {{{{ type ipv{{n}}_addr; }}}}
  set ports{{n}} {{{{ type ipv{{n}}_addr . inet_proto . inet_service; }}}}
  set refused{{n}} {{{{ type ipv{{n}}_addr . inet_proto . inet_service; }}}}
  chain to{{n}} {{{{
    {{ip}} daddr . meta l4proto . th dport @refused{{n}} jump refuse
    {{ip}} daddr . meta l4proto . th dport @ports{{n}} meta mark set meta mark | {{bit}} accept
    {{errors}}
  }}}}
  chain from{{n}} {{{{
    meta priority 0:{OWN_PRIORITY} {{dscp}} goto nowhere
    {{refusal}}
    {{ip}} daddr . meta l4proto . th dport @ports{{n}} meta mark set meta mark | {{bit}} accept
    goto nowhere
  }}}}
"""
_ICMP_ERRORS = "meta l4proto {icmp} socket transparent 1 meta mark set meta mark | {bit}"
_FAMILIES = (
    {
        "n": 4,
        "ip": "ip",
        "icmp": 1,
        # Whose type of service the kernel does not map to that priority (ip_tos2prio).
        "dscp": "@nh,8,8 & 0x18 != 0x18",
        # Over `lo` the kernel would send the ICMP error from the address itself, which over IPv4 it can't. So
        # the sender is told by EPERM.
        "refusal": "ip daddr . meta l4proto . udp dport @refused4 reject with icmp type port-unreachable",
    },
    {"n": 6, "ip": "ip6", "icmp": 58, "dscp": "", "refusal": ""},
)


class Unusable(Exception):  # noqa: N818 - it says what is the case
    """Packets can't be marked here: one line, why and what to do."""


class _Contents(NamedTuple):
    """What is in the table's sets."""

    ips: frozenset[str] = frozenset()
    ports: frozenset[ListenerKey] = frozenset()
    refused: frozenset[ListenerKey] = frozenset()


class Marks:
    """This node's table and rules. It remembers what it last put in force, so that small changes stay small.

    Args:
        bit: the bit of a packet's mark that is used.

    Attributes:
        trouble: "", or one line: what does not work.
        needed: what the policy rules do that the last `sync` needs.
    """

    def __init__(self, bit: int = DEFAULT_MARK) -> None:
        self.trouble = ""
        self.needed: frozenset[tuple[object, ...]] = frozenset()
        self._bit = bit
        self._contents = _Contents()
        self._rules: tuple[bytes, ...] = ()  # of the table, as the kernel told; () where that is not known
        self._generation = 0

    def present(self) -> dict[ListenerKey, Action]:
        """The keys in the table, whichever process made it; those that are refused as UNREACHABLE.

        Raises:
            OSError: netfilter's netlink cannot be used.
        """
        found = _read()
        return {
            key: Action.UNREACHABLE if key in found.refused else Action.LOCAL
            for key in found.ports | found.refused
        }

    def sync(
        self,
        netlink: Netlink,
        routes: RouteTable,
        last: RouteTable,
        wanted: Mapping[ListenerKey, Action],
        refused_too: AbstractSet[ListenerKey],
    ) -> dict[ListenerKey, str]:
        """Steer these, and no others. Routes that nobody needs stay.

        Args:
            netlink: of rtnetlink.
            routes: the table that the rule leads to.
            last: the table that the rule after all others leads to.
            wanted: what becomes of each.
            refused_too: LOCAL ones that new clients are refused at.

        Returns:
            One line for each key that failed.

        Raises:
            Unusable: what was steered by marks before still is.
            OSError: netlink failed.
        """
        no_way = routes.add(dict.fromkeys(key.ip for key in wanted), replace=False)
        versions = {6 if ":" in key.ip else 4 for key in wanted if key.ip not in no_way}
        rules = [rule_of_mark(version, self._bit) for version in versions]
        for rule, failure in add_rules(netlink, rules).items():
            versions.discard(rule.version)
            no_way |= {key.ip: failure.text for key in wanted if (":" in key.ip) == (rule.version == 6)}
        failed = {key: f"cannot steer {key}: {no_way[key.ip]}" for key in wanted if key.ip in no_way}
        wish = _Contents(
            frozenset(key.ip for key in wanted if key not in failed),
            frozenset(key for key in wanted if key not in failed),
            frozenset(key for key, how in wanted.items() if how is Action.UNREACHABLE or key in refused_too)
            - failed.keys(),
        )
        if reason := self._change(wish):
            raise Unusable(reason)
        if wish.ips:
            # Where these fail, the node's own clients that have no other route to an address get none.
            last.add(sources(wish.ips))
            add_rules(netlink, after := [last_rule(version) for version in versions])
            rules += after
        self.needed = frozenset(rule.what for rule in rules)
        delete_rules(
            netlink,
            [rule for rule in own_rules(netlink) if rule.key is None and rule.what not in self.needed],
        )
        return failed

    def leave(self, netlink: Netlink) -> None:
        """Take back what there is of marks, where other means are in force now.

        Raises:
            OSError: netlink failed.
        """
        self._remove()
        delete_rules(netlink, [rule for rule in own_rules(netlink) if rule.key is None])

    @property
    def made(self) -> bool:
        """Whether the table is there, as far as is known."""
        return bool(self._rules)

    def _change(self, wish: _Contents) -> str | None:
        """Put these contents in force. None, or one line: why it failed."""
        if not wish.ips:
            return self._remove()
        if self._is_as_made():
            script = _differences(self._contents, wish)
            if not script or run(script) is None:
                self._contents = wish
                if script:
                    self._generation += 1  # another one: somebody else has changed something too
                return None
        return self._replace(wish)

    def _is_as_made(self) -> bool:
        """Whether the table is as this object last made it."""
        if not self._rules:
            return False
        try:
            now = generation()
            if now != self._generation:
                if rules_of(NFT_TABLE) != self._rules or _read() != self._contents:
                    return False
                self._generation = now
        except OSError:  # others change so much that it can't be read
            return False
        return True

    def _replace(self, wish: _Contents) -> str | None:
        self._rules = ()
        failed = run(_whole(wish, self._bit, _ICMP_ERRORS))
        self.trouble = ""
        if failed is not None:
            # A kernel or an nft without the `socket` expression; any other error comes back.
            if run(_whole(wish, self._bit, "")) is not None:
                return failed
            self.trouble = (
                "clients of foreign addresses behind a smaller MTU may hang: "
                f"the kernel's nft_socket can't be used: {failed}"
            )
        try:
            self._generation = generation()
            self._rules = rules_of(NFT_TABLE)
        except OSError:
            self._rules = ()  # it is made anew with the next change
        self._contents = wish
        return None

    def _remove(self) -> str | None:
        self._rules, self.trouble = (), ""
        try:
            there = [table for table in (NFT_TABLE, EARLIER_NFT_TABLE) if table_exists(table)]
        except OSError:
            return None  # where nftables can't be used there is nothing
        return "; ".join(filter(None, map(delete_table, there))) or None


def _read() -> _Contents:
    """What is in the table's sets.

    Raises:
        OSError: netfilter's netlink cannot be used.
    """
    return _Contents(
        frozenset(unpacked(member) for member in _members("ips")),
        frozenset(map(port_of, _members("ports"))),
        frozenset(map(port_of, _members("refused"))),
    )


def _members(name: str) -> list[bytes]:
    return [*members_of(NFT_TABLE, f"{name}4"), *members_of(NFT_TABLE, f"{name}6")]


def _differences(have: _Contents, wish: _Contents) -> str:
    """Commands that lead from one to the other; "" if they are the same."""
    return "".join(
        [
            *_elements("add", wish.ips - have.ips, wish.ports - have.ports, wish.refused - have.refused),
            *_elements("delete", have.ips - wish.ips, have.ports - wish.ports, have.refused - wish.refused),
        ]
    )


def _elements(
    verb: str, ips: Iterable[str], ports: Iterable[ListenerKey], refused: Iterable[ListenerKey]
) -> list[str]:
    return [
        *elements(verb, NFT_TABLE, "ips", ips),
        *elements(verb, NFT_TABLE, "ports", map(port, ports)),
        *elements(verb, NFT_TABLE, "refused", map(port, refused)),
    ]


def _whole(wish: _Contents, bit: int, errors: str) -> str:
    """A script that makes the table anew. Declared first, it can be deleted whether or not it was there."""
    mark = {"bit": bit, "others": ~bit & 0xFFFFFFFF}
    chains = [
        _FAMILY_CHAINS.format(**family, **mark, errors=errors.format(**family, **mark))
        for family in _FAMILIES
    ]
    return "".join(
        [
            *(f"table inet {table}\ndelete table inet {table}\n" for table in (NFT_TABLE, EARLIER_NFT_TABLE)),
            f"table inet {NFT_TABLE} {{\n",
            *chains,
            _CHAINS.format(**mark),
            "}\n",
            *_elements("add", *wish),
        ]
    )
