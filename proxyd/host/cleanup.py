"""Finds, counts and removes what a killed proxyd left on the node."""

from __future__ import annotations

from typing import NamedTuple

from proxyd.host import fragments, guard, marking, parked, udp_source
from proxyd.host.guard import VipGuard
from proxyd.host.netlink import Netlink
from proxyd.host.nft import ARP, table_exists
from proxyd.host.policy_rules import own_rules, steering_routes
from proxyd.host.routes import VipRoutes
from proxyd.host.steering import Steering

_TABLES = (guard.TABLE, marking.NFT_TABLE, marking.EARLIER_NFT_TABLE, fragments.TABLE, udp_source.TABLE)
_SHOWN = 4  # so many failures are named one by one


class Leftovers(NamedTuple):
    """How many of proxyd's own routes, rules and tables are on the node."""

    vip_routes: int = 0
    rules: int = 0
    steering_routes: int = 0
    tables: int = 0  # of nftables
    programs: int = 0  # pinned in the BPF file system

    def __bool__(self) -> bool:
        return any(self)


class Removal(NamedTuple):
    """The result of a removal, with a text for each kind of thing.

    Attributes:
        gone: what was removed, or would be, such as "2 VIP routes".
        failed: what could not be removed, and why.
    """

    gone: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def find_leftovers() -> Leftovers:
    """Count what has proxyd's numbers and names, whoever made it. To see nft tables takes CAP_NET_ADMIN.

    Raises:
        OSError: netlink failed.
    """
    try:
        tables = sum(map(table_exists, _TABLES))
        tables += table_exists(guard.TABLE, ARP)
    except OSError:
        tables = 0
    with Netlink() as netlink:
        rules = len(own_rules(netlink))
    return Leftovers(
        vip_routes=len(VipRoutes().present()),
        rules=rules,
        steering_routes=len(steering_routes()),
        tables=tables,
        programs=int(parked.is_pinned()),
    )


def remove_leftovers(*, dry_run: bool = False) -> Removal:
    """Remove everything that `find_leftovers` counts. Another proxyd that serves here would lose its VIPs.

    Args:
        dry_run: only tell what would be removed.

    Raises:
        OSError: netlink failed.
    """
    found = find_leftovers()
    if dry_run:
        return Removal(_counted(found))
    steering, routes = Steering(), VipRoutes()
    failed = [*steering.sync({}).values(), *routes.remove(routes.present()).values()]
    if steering.trouble:
        failed.append(steering.trouble)
    if error := udp_source.UdpSourcePorts().remove():
        failed.append(f"cannot remove the table of UDP replies: {error}")
    # Last: they protect the VIPs while there are any.
    if found.tables and (reason := VipGuard().remove()):
        failed.append(f"cannot remove the VIP guard: {reason}")
    parked.discard({})
    left = find_leftovers()
    gone = Leftovers(*(before - after for before, after in zip(found, left, strict=True)))
    more = [f"and {len(failed) - _SHOWN} more failures"] if len(failed) > _SHOWN else []
    return Removal(_counted(gone), (*failed[:_SHOWN], *more))


def _counted(found: Leftovers) -> tuple[str, ...]:
    return tuple(
        f"{count} {one if count == 1 else many}"
        for count, one, many in (
            (found.rules, "policy rule for a foreign address", "policy rules for foreign addresses"),
            (found.steering_routes, "route of a foreign address", "routes of foreign addresses"),
            (found.vip_routes, "VIP route", "VIP routes"),
            (found.tables, "nft table", "nft tables"),
            (found.programs, "program that looks up VIPs", "programs that look up VIPs"),
        )
        if count > 0
    )
