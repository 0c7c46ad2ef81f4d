"""Addresses that are in use around the node, and so cannot be VIPs.

A VIP is made local to this node. If it were an address of the node itself, its own daemons could no longer be
reached there; if a neighbour's or a next hop's, that host could not, or whatever is behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import msgspec

from proxyd.api.addresses import Network, parse_cidr, parse_ip


class Occupied(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """What is in use, in order.

    Attributes:
        addresses: each with what it is, such as "an address of this node, at eth0".
        networks: CIDRs of the networks that the node is connected to, each with its interface.
    """

    addresses: tuple[tuple[str, str], ...] = ()
    networks: tuple[tuple[str, str], ...] = ()


def why_not(ip: str, occupied: Occupied) -> str:
    """Why an address in canonical form can be no VIP, in words that follow it; "" if it can."""
    addresses, networks = _prepared(occupied)
    if what := addresses.get(ip):
        return f"is {what}"
    if networks and (address := parse_ip(ip)) is not None:
        for network, interface in networks:
            if address in network:
                return f"is in {network}, a network of this node at {interface}"
    return ""


def overlaps(cidrs: Iterable[str], occupied: Occupied) -> Iterator[str]:
    """What of the service ranges is in use, in words: at most one line for each network or address."""
    addresses, networks = _prepared(occupied)
    for cidr in cidrs:
        wanted = parse_cidr(cidr)
        if wanted is None:
            continue
        for network, interface in networks:
            if network.version == wanted.version and network.overlaps(wanted):
                yield f"{cidr} overlaps {network}, a network of this node at {interface}"
        for ip, what in addresses.items():
            address = parse_ip(ip)
            if address in wanted and not any(address in network for network, _ in networks):
                yield f"{cidr} has {ip} in it, which is {what}"


@lru_cache(maxsize=4)
def _prepared(occupied: Occupied) -> tuple[dict[str, str], list[tuple[Network, str]]]:
    networks = [(parse_cidr(cidr), interface) for cidr, interface in occupied.networks]
    return dict(occupied.addresses), [
        (network, interface) for network, interface in networks if network is not None
    ]
