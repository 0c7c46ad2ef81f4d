"""What a killed proxyd left on the node, and what kube-proxy did: found, counted, and the former removed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

from proxyd.host import guard, refusal
from proxyd.host.addresses import link_names
from proxyd.host.guard import VipGuard
from proxyd.host.netlink import NETLINK_NETFILTER, Message, Netlink, attributes
from proxyd.host.nft import table_exists, which
from proxyd.host.routes import VipRoutes
from proxyd.host.steering import STEERING_TABLE, Steering, steering_routes

# linux/netfilter/nf_tables.h, linux/netfilter.h
_GETCHAIN = 10 << 8 | 4  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETCHAIN
_NFTA_CHAIN_TABLE, _NFTA_CHAIN_NAME = 1, 3
_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
# Chains that take or refuse service traffic (kubernetes pkg/proxy: iptables, ipvs and, until 1.25, userspace). KUBE-FIREWALL
# and the canaries are the kubelet's and stay.
_CHAINS = (
    "KUBE-PORTALS-",
    "KUBE-SERVICES",
    "KUBE-NODEPORT",
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
_NFT_TABLE = "kube-proxy"  # of its nftables mode, families ip and ip6
_IPVS_LINK = "kube-ipvs0"  # of its ipvs mode: every VIP is an address of it
_SHOWN = 4  # names in one line
_TIMEOUT = 10.0


class Leftovers(NamedTuple):
    """How many things of proxyd's own are on the node."""

    vip_routes: int = 0
    rules: int = 0
    steering_routes: int = 0
    tables: int = 0  # of nftables

    def __bool__(self) -> bool:
        return any(self)


def find_leftovers() -> Leftovers:
    """Count what carries proxyd's numbers and names, whichever process made it. Without CAP_NET_ADMIN nft tables are not seen.

    Raises:
        OSError: netlink failed.
    """
    try:
        tables = sum(table_exists(table) for table in (guard.TABLE, refusal.TABLE))
    except OSError:
        tables = 0
    return Leftovers(
        vip_routes=len(VipRoutes().present()),
        rules=len(Steering().present()),
        steering_routes=len(steering_routes()),
        tables=tables,
    )


def remove_leftovers(*, dry_run: bool = False) -> list[str]:
    """Remove everything that `find_leftovers` counts. Not while another proxyd serves here: it would lose its VIPs.

    Args:
        dry_run: only say what would be removed.

    Returns:
        One line for each kind of thing removed, and one for each failure; [] where there was nothing.

    Raises:
        OSError: netlink failed.
    """
    found = find_leftovers()
    if dry_run:
        return [f"would remove {line}" for line in _counted(found)]
    steering, routes = Steering(), VipRoutes()
    failed = [*steering.remove(steering.present()).values(), *routes.remove(routes.present()).values()]
    # Last: it protects the VIPs while there are any.
    if found.tables and (reason := VipGuard().remove()):
        failed.append(f"cannot remove the VIP guard: {reason}")
    left = find_leftovers()
    gone = Leftovers(*(before - after for before, after in zip(found, left, strict=True)))
    lines = [f"removed {line}" for line in _counted(gone)] + failed[:_SHOWN]
    if len(failed) > _SHOWN:
        lines.append(f"and {len(failed) - _SHOWN} more failures")
    return lines


def _counted(found: Leftovers) -> list[str]:
    return [
        f"{count} {one if count == 1 else many}"
        for count, one, many in (
            (found.rules, "policy rule for a foreign address", "policy rules for foreign addresses"),
            (found.steering_routes, f"route of table {STEERING_TABLE}", f"routes of table {STEERING_TABLE}"),
            (found.vip_routes, "VIP route", "VIP routes"),
            (found.tables, "nft table", "nft tables"),
        )
        if count > 0
    ]


def kube_proxy_leftovers() -> list[str]:
    """What kube-proxy left that takes service traffic before it reaches a listener. Nothing is changed.

    Needs CAP_NET_ADMIN; without it, or where a tool is missing, what cannot be seen is not reported.

    Returns:
        One line for each table or interface, naming what was found.
    """
    lines: list[str] = []
    tables: dict[str, list[str]] = {}
    try:
        for family, table, chain in _nft_chains():
            if (table == _NFT_TABLE and family in ("ip", "ip6", "inet")) or chain.startswith(_CHAINS):
                tables.setdefault(f"nft table {family} {table}", []).append(chain)
    except OSError:
        tables = {}
    for program, names in (("iptables", "ip_tables_names"), ("ip6tables", "ip6_tables_names")):
        for table, chain in _legacy_chains(program, names):
            if chain.startswith(_CHAINS):
                tables.setdefault(f"{program} (legacy) table {table}", []).append(chain)
    for table, chains in tables.items():
        more = f" and {len(chains) - _SHOWN} more" if len(chains) > _SHOWN else ""
        lines.append(f"{table}: {', '.join(sorted(chains)[:_SHOWN])}{more}")
    try:
        if _IPVS_LINK in link_names():
            lines.append(f"interface {_IPVS_LINK}: virtual servers of IPVS")
    except OSError:
        pass
    return lines


def _nft_chains() -> list[tuple[str, str, str]]:
    """Family, table and name of every nftables chain, those of iptables-nft among them."""
    found = []
    with Netlink(NETLINK_NETFILTER) as netlink:
        for message in netlink.dump(Message(_GETCHAIN, bytes(4))):
            seen = attributes(message.body, 4)
            table, chain = (
                seen.get(kind, b"").rstrip(b"\0").decode("utf-8", "replace")
                for kind in (_NFTA_CHAIN_TABLE, _NFTA_CHAIN_NAME)
            )
            found.append((_FAMILIES.get(message.body[0], str(message.body[0])), table, chain))
    return found


def _legacy_chains(program: str, names: str) -> list[tuple[str, str]]:
    """Table and name of every chain of the older iptables; only of tables that are loaded, so that none gets loaded."""
    try:
        loaded = Path("/proc/thread-self/net", names).read_text(encoding="ascii").split()
    except OSError:
        return []
    save = which(f"{program}-legacy-save") or which(f"{program}-save")
    if save is None:
        return []
    found = []
    for table in sorted(set(loaded)):
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
        found += [(table, line[1:].split()[0]) for line in done.stdout.splitlines() if line.startswith(":")]
    return found
