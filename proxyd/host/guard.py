"""The VIP guard: an nftables table that rejects packets to a VIP which are not for a service port.

A VIP is local to the node, so without the guard VIP:22 would reach the node's own sshd. The rules keep no
state and do not load connection tracking. They recognise by a packet alone whether it is from a new client:

- TCP: only a first SYN is rejected. So answers to connections from a VIP pass, and so do relays of a removed
  service port. The very first rule accepts every other segment, as most packets are such.
- UDP: a datagram that comes from a service port over `lo` is an answer to the node's own client, whose
  address is the VIP. So is one to a socket that is bound to the VIP (on kernels with `socket` expressions).
- SCTP: only an INIT chunk is rejected.
- IPv6 fragments pass the hook before they are reassembled (IPv4 ones afterwards). All but the first are
  accepted: they have no port, and are of no use without the first.
- ICMP passes: its errors carry path MTU and refusals, and an echo does no harm.

A second table, of family arp, keeps VIPs out of the neighbours' tables: the kernel would answer for every
local address on every link. Traffic that is routed here needs no answer. Requests are dropped unless the
link's network has the VIP in it, or its proxy_arp is set. And what the node asks for in a VIP's name, before
a reply from there leaves, it asks in the name of the link's own address. (For IPv6 the kernel answers for a
link's addresses only.)

The guard needs the program `nft` and CAP_NET_ADMIN. Without them proxyd works, but unguarded. The rules name
protocols by number (ICMP 1 and 58, UDP 17): a minimal node has no /etc/protocols, which many versions of nft
need for names.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from proxyd.api.service import Protocol
from proxyd.host.networks import Links
from proxyd.host.nft import (
    ARP,
    REJECT_NEW_TCP,
    REJECT_OTHER,
    Run,
    delete_table,
    elements,
    port,
    refused,
    run,
    table_exists,
    which,
)
from proxyd.state.spec import ListenerKey

TABLE = "proxyd"

_RULES = """
table inet proxyd {{
  set vips4 {{ type ipv4_addr; }}
  set vips6 {{ type ipv6_addr; }}
  set ports4 {{ type ipv4_addr . inet_proto . inet_service; }}
  set ports6 {{ type ipv6_addr . inet_proto . inet_service; }}
  chain input {{
    type filter hook input priority filter - 10; policy accept;
    {first}
    ip daddr @vips4 goto guard4
    ip6 daddr @vips6 goto guard6
  }}
  chain guard4 {{
    ip daddr . meta l4proto . th dport @ports4 accept
    iif lo ip saddr . meta l4proto . th sport @ports4 accept
    goto guard
  }}
  chain guard6 {{
    frag frag-off != 0 accept
    ip6 daddr . meta l4proto . th dport @ports6 accept
    iif lo ip6 saddr . meta l4proto . th sport @ports6 accept
    goto guard
  }}
  chain guard {{
    meta l4proto {{ 1, 58 }} accept
    {tcp}
    {socket}
    {other}
  }}
}}
"""
_ARP_RULES = """
table arp proxyd {
  set vips { type ipv4_addr; }
  set proxies { type ifname; }
  map own { type ifname : ipv4_addr; }
  chain networks { }
  chain input {
    type filter hook input priority filter; policy accept;
    arp daddr ip != @vips accept
    arp operation != request accept
    iifname @proxies accept
    jump networks
    drop
  }
  chain output {
    type filter hook output priority filter; policy accept;
    arp operation request arp saddr ip @vips arp saddr ip set oifname map @own
  }
}
"""
_NO_FIRST_SYN = "tcp flags & (fin | syn | rst | ack) != syn accept"
_OTHERS_ONLY = "meta l4proto {1, 6, 17, 58} accept"
_BOUND_SOCKET = "meta l4proto 17 socket wildcard 0 accept"


class VipGuard:
    """The guard of this node. Remembers what it last put in force, so that small changes stay small.

    Args:
        others_only: leave TCP and UDP alone, which the program of `proxyd.host.parked` guards.

    Attributes:
        no_arp: why VIPs are answered for by ARP, in one line; "" if they are not.
    """

    def __init__(self, *, others_only: bool = False) -> None:
        self.no_arp = ""
        self._links = self._wanted_links = Links()
        self._first = _OTHERS_ONLY if others_only else _NO_FIRST_SYN
        self._others_only = others_only
        self._vips: frozenset[str] = frozenset()
        self._ports: frozenset[ListenerKey] = frozenset()
        self._known = False  # whether the kernel has what the two above say
        self._begun: tuple[frozenset[str], frozenset[ListenerKey], Run] | None = None

    def available(self) -> str | None:
        """None if the guard can be used, else one line that says why not, and what to do."""
        if which("nft") is None:
            return "the program `nft` was not found; install nftables"
        try:
            self.present()
        except OSError as error:
            return refused(error)
        return None

    def present(self) -> bool:
        """Whether the tables exist, whichever process made them.

        Raises:
            OSError: netfilter's netlink cannot be used; EPERM without CAP_NET_ADMIN.
        """
        return table_exists(TABLE) and (bool(self.no_arp) or table_exists(TABLE, ARP))

    def set_links(self, links: Links) -> None:
        """Say which links there are; the next `sync` goes by it."""
        self._wanted_links = links

    def begin(self, vips: frozenset[str], ports: frozenset[ListenerKey]) -> None:
        """Begin to set up a first guard, while the caller goes on; `sync` waits for it, and corrects it.

        It guards VIPs before they become local. If there is a guard already nothing happens.

        Args:
            vips: as of `sync`: the addresses that will be local.
            ports: as of `sync`: the listeners that will be open.
        """
        if self._known or self._begun is not None:
            return
        vips = frozenset(ip for ip in vips if not _loopback(ip))
        ports = self._guarded(ports, vips)
        self._links = self._wanted_links
        self._begun = (vips, ports, Run(self._whole(vips, ports, _BOUND_SOCKET, arp=True)))

    def sync(self, vips: frozenset[str], ports: frozenset[ListenerKey]) -> str | None:
        """Guard these VIPs, all but these ports, in one atomic change. A flushed ruleset is made anew.

        Args:
            vips: addresses that proxyd's routes make local. Those in 127.0.0.0/8 and ::1 are not guarded.
            ports: the listeners that are open. A closed one must not be among them: clients would reach a
                daemon that is bound to all addresses. Ports of other addresses are ignored.

        Returns:
            None, or one line that says what went wrong.
        """
        vips = frozenset(ip for ip in vips if not _loopback(ip))
        ports = self._guarded(ports, vips)
        wish = (vips, ports, self._wanted_links)
        if self._ended() and (self._vips, self._ports, self._links) == wish:
            return None
        try:
            known = self._known and self.present()
        except OSError as error:
            return refused(error)
        if known:
            failed = self._change(vips, ports)
            if failed is None:
                return None
        # The sets are not as remembered, as somebody else changed the table: replace all of it.
        failed = self._replace(vips, ports)
        self._known = failed is None
        if failed is None:
            self._vips, self._ports, self._links = wish
        return failed

    def forget(self) -> None:
        """Have the next `sync` make the table anew: somebody else has changed it."""
        self._known = False

    def remove(self) -> str | None:
        """Delete the tables. Returns None, or one line that says what went wrong."""
        self._ended()
        self._known = False
        return delete_table(TABLE) or delete_table(TABLE, ARP)

    def _ended(self) -> bool:
        """Wait for the change that was begun. Returns whether it is in force."""
        if self._begun is None:
            return False
        (self._vips, self._ports, run_of_nft), self._begun = self._begun, None
        self._known = run_of_nft.wait() is None
        return self._known

    def _change(self, vips: frozenset[str], ports: frozenset[ListenerKey]) -> str | None:
        # A port is admitted before its VIP is guarded, and a VIP is released before its ports are.
        script = "".join(
            [
                *elements("add", TABLE, "ports", map(port, ports - self._ports)),
                *elements("add", TABLE, "vips", vips - self._vips),
                *elements("delete", TABLE, "vips", self._vips - vips),
                *elements("delete", TABLE, "ports", map(port, self._ports - ports)),
            ]
        )
        if not self.no_arp:
            script += _arp_vips("add", vips - self._vips) + _arp_vips("delete", self._vips - vips)
            if self._links != self._wanted_links:
                script += _arp_links(self._wanted_links)
        failed = run(script) if script else None
        if failed is None:
            self._vips, self._ports, self._links = vips, ports, self._wanted_links
        return failed

    def _replace(self, vips: frozenset[str], ports: frozenset[ListenerKey]) -> str | None:
        # A kernel or an nft may have no `socket` expression, and no tables for ARP; other errors come again.
        errors: list[str] = []
        for arp, socket in product((True, False), (_BOUND_SOCKET, "")):
            failed = run(self._whole(vips, ports, socket, arp=arp))
            if failed is None:
                self.no_arp = "" if arp else errors[-1]
                return None
            errors.append(failed)
        return errors[0]

    def _whole(self, vips: frozenset[str], ports: frozenset[ListenerKey], socket: str, *, arp: bool) -> str:
        """A script that makes the tables anew. It adds each first, so that it can delete it."""
        rules = _RULES.format(first=self._first, tcp=REJECT_NEW_TCP, socket=socket, other=REJECT_OTHER)
        script = "".join(
            [
                f"table inet {TABLE}\ndelete table inet {TABLE}\n",
                rules,
                *elements("add", TABLE, "ports", map(port, ports)),
                *elements("add", TABLE, "vips", vips),
            ]
        )
        if arp:
            script += f"table arp {TABLE}\ndelete table arp {TABLE}\n{_ARP_RULES}"
            script += _arp_vips("add", vips) + _arp_links(self._wanted_links)
        return script

    def _guarded(self, ports: frozenset[ListenerKey], vips: frozenset[str]) -> frozenset[ListenerKey]:
        """Of what is listened on, what the table has to let through."""
        return frozenset(
            key
            for key in ports
            if key.ip in vips and not (self._others_only and key.protocol is not Protocol.SCTP)
        )


def _arp_vips(verb: str, vips: Iterable[str]) -> str:
    members = ", ".join(ip for ip in vips if ":" not in ip)
    return f"{verb} element arp {TABLE} vips {{ {members} }}\n" if members else ""


def _arp_links(links: Links) -> str:
    """Commands that have the table know these links and no others."""
    proxies = ", ".join(f'"{name}"' for name in sorted(links.proxies))
    own = ", ".join(f'"{name}" : {ip}' for name, ip in links.own)
    return "".join(
        [
            f"flush set arp {TABLE} proxies\nflush map arp {TABLE} own\nflush chain arp {TABLE} networks\n",
            f"add element arp {TABLE} proxies {{ {proxies} }}\n" if proxies else "",
            f"add element arp {TABLE} own {{ {own} }}\n" if own else "",
            *(
                f'add rule arp {TABLE} networks iifname "{name}" arp daddr ip {cidr} accept\n'
                for name, cidr in links.networks
            ),
        ]
    )


def _loopback(ip: str) -> bool:
    return ip.startswith("127.") or ip == "::1"
