"""What each mode of kube-proxy left on the node: rules that take traffic before a listener gets it."""

from __future__ import annotations

import enum
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from proxyd.host.addresses import link_names
from proxyd.host.kubechains import PREFIXES, loaded_tables
from proxyd.host.netlink import NETLINK_NETFILTER, Message, Netlink, attributes
from proxyd.host.nft import which

# linux/netfilter/nf_tables.h, linux/netfilter.h
_GETCHAIN = 10 << 8 | 4  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETCHAIN
_NFTA_CHAIN_TABLE, _NFTA_CHAIN_NAME = 1, 3
_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
# Chains that take or refuse service traffic; kubernetes pkg/proxy/iptables and pkg/proxy/ipvs share some.
# KUBE-FIREWALL and the canaries are not among them: they belong to the kubelet.
_CHAINS = (
    "KUBE-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-NODE-PORT",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-PROXY-FIREWALL",
    "KUBE-LOAD-BALANCER",
    "KUBE-SVC-",
    "KUBE-SVL-",
    "KUBE-EXT-",
    "KUBE-SEP-",
    "KUBE-FW-",
    "KUBE-XLB-",
)
_NFT_TABLE = "kube-proxy"  # of the nftables mode, in families ip and ip6
_IPVS_LINK = "kube-ipvs0"  # of the IPVS mode: every VIP is an address of this interface
_SHOWN = 4  # so many names are in one line
_TIMEOUT = 10.0


class Mode(enum.StrEnum):
    """A mode of kube-proxy."""

    USERSPACE = "userspace"
    IPTABLES = "iptables"
    IPVS = "IPVS"
    NFTABLES = "nftables"


class Leftover(NamedTuple):
    """The things that a mode left in one place."""

    mode: Mode
    place: str  # such as "nft table ip nat" or "interface kube-ipvs0"
    names: tuple[str, ...]
    table: str = ""  # family and name of an nftables table

    def __str__(self) -> str:
        more = f" and {len(self.names) - _SHOWN} more" if len(self.names) > _SHOWN else ""
        return f"{self.place}: {', '.join(sorted(self.names)[:_SHOWN])}{more}"

    @property
    def removed_by(self) -> str:
        """The command by which an operator removes it."""
        match self.mode:
            case Mode.USERSPACE:
                return "proxyd cleanup --kube-proxy"
            case Mode.NFTABLES:
                return f"nft delete table {self.table}"
            case Mode.IPVS:
                return "ipvsadm --clear; ip link delete kube-ipvs0"
            case Mode.IPTABLES:
                return "kube-proxy --cleanup"


def kube_proxy_leftovers() -> list[Leftover]:
    """Look for what kube-proxy left; nothing is changed.

    It needs CAP_NET_ADMIN and the tools of iptables and nftables; what it cannot see it does not report.
    """
    found: dict[tuple[Mode, str, str], list[str]] = {}  # names of chains, by mode, place and nftables table
    try:
        for family, table, chain in _nft_chains():
            own = table == _NFT_TABLE and family in ("ip", "ip6", "inet")
            if mode := Mode.NFTABLES if own else _mode(chain):
                where = f"{family} {table}"
                found.setdefault((mode, f"nft table {where}", where), []).append(chain)
    except OSError:
        found = {}
    for program, names in (("iptables", "ip_tables_names"), ("ip6tables", "ip6_tables_names")):
        for table, chain in _legacy_chains(program, names):
            if mode := _mode(chain):
                found.setdefault((mode, f"{program} (legacy) table {table}", ""), []).append(chain)
    leftovers = [
        Leftover(mode, place, tuple(chains), table) for (mode, place, table), chains in found.items()
    ]
    try:
        if _IPVS_LINK in link_names():
            leftovers.append(Leftover(Mode.IPVS, f"interface {_IPVS_LINK}", ("virtual servers of IPVS",)))
    except OSError:
        pass
    return leftovers


def _mode(chain: str) -> Mode | None:
    if chain.startswith(PREFIXES):
        return Mode.USERSPACE
    return Mode.IPTABLES if chain.startswith(_CHAINS) else None


def _nft_chains() -> Iterator[tuple[str, str, str]]:
    """Yields family, table and name of every nftables chain, also of iptables-nft."""
    with Netlink(NETLINK_NETFILTER) as netlink:
        for message in netlink.dump(Message(_GETCHAIN, bytes(4))):
            seen = attributes(message.body, 4)
            table, chain = (
                seen.get(kind, b"").rstrip(b"\0").decode("utf-8", "replace")
                for kind in (_NFTA_CHAIN_TABLE, _NFTA_CHAIN_NAME)
            )
            yield _FAMILIES.get(message.body[0], str(message.body[0])), table, chain


def _legacy_chains(program: str, names: str) -> Iterator[tuple[str, str]]:
    """Yields table and name of every chain of iptables-legacy, in loaded tables only: asking loads others."""
    save = which(f"{program}-legacy-save") or which(f"{program}-save")
    if save is None:
        return
    for table in sorted(set(loaded_tables(names))):
        try:
            done = subprocess.run(  # noqa: S603 - the program's own path, a table name of the kernel's
                [save, "-t", table],
                capture_output=True,
                timeout=_TIMEOUT,
                check=False,
                text=True,
                errors="replace",
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        for line in done.stdout.splitlines():
            if line.startswith(":"):
                yield table, line[1:].split()[0]
