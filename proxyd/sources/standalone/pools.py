"""The pools of cluster addresses and nodePorts: what is taken, and which one is allocated next."""

from __future__ import annotations

import ipaddress
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeAlias

from proxyd.api.meta import ObjectName
from proxyd.api.service import ServicePort

_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# The holder of nodePorts that are withheld.
_SOMEBODY = ObjectName("", "")


def port_key(port: ServicePort) -> str:
    """The key of a service port in an allocation: its name, or else its number, and the protocol."""
    return f"{port.name or port.port}/{port.protocol}"


class AddressPool:
    """The cluster addresses that are taken.

    Args:
        cidrs: one range, or one of each IP version; the first one's version is the default.
    """

    def __init__(self, cidrs: Collection[str]) -> None:
        networks = [ipaddress.ip_network(cidr, strict=False) for cidr in cidrs]
        # The first and the last address to allocate, as numbers, by IP version.
        self._limits: dict[int, tuple[int, int]] = {
            network.version: _usable(network) for network in reversed(networks)
        }
        self.families: tuple[int, ...] = tuple(dict.fromkeys(network.version for network in networks))
        self._taken: set[str] = set()
        self._closed: dict[int, list[tuple[int, int]]] = {4: [], 6: []}  # first and last, in order
        self._exhausted: set[int] = set()

    def give(self, addresses: Collection[str]) -> None:
        """Marks addresses as taken that a manifest gives; they need not be in range."""
        self._taken.update(str(ipaddress.ip_address(address)) for address in addresses)

    def withhold(self, addresses: Collection[str]) -> None:
        """Marks addresses, in canonical form, as taken by somebody else."""
        self._taken.update(addresses)

    def withhold_networks(self, cidrs: Collection[str]) -> None:
        """Reserve all addresses of networks that somebody else uses."""
        for network in map(ipaddress.ip_network, cidrs):
            first = int(network.network_address)
            self._closed[network.version].append((first, first + network.num_addresses - 1))
        for closed in self._closed.values():
            closed.sort()

    def keep(self, addresses: Collection[str], wanted: Collection[int]) -> dict[int, str]:
        """Takes those of `addresses` (canonical) that are wanted, in range and free; by IP version."""
        kept: dict[int, str] = {}
        for address in addresses:
            version = 6 if ":" in address else 4
            if (
                version in kept
                or version not in wanted
                or version not in self._limits
                or address in self._taken
            ):
                continue
            first, last = self._limits[version]
            number = int(ipaddress.ip_address(address))
            closed = any(low <= number <= high for low, high in self._closed[version])
            if first <= number <= last and not closed:
                self._taken.add(address)
                kept[version] = address
        return kept

    def new(self, name: ObjectName, version: int) -> str:
        """Takes a free address, if possible the same one for the same name; "" if there is none."""
        if version in self._exhausted:
            return ""
        parse = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
        for number in _probe(name, *self._limits[version], closed=self._closed[version]):
            address = str(parse(number))
            if address not in self._taken:
                self._taken.add(address)
                return address
        self._exhausted.add(version)
        return ""


class NodePortPool:
    """The nodePorts that are taken, and the Services that have them.

    As in Kubernetes a number belongs to one Service, whatever the protocol. The Service may use it twice, for
    the same `port` on two protocols (kubernetes pkg/registry/core/service/storage/alloc.go).

    Args:
        limits: first and last number, both included.
    """

    def __init__(self, limits: tuple[int, int]) -> None:
        self._first, self._last = limits
        self._holders: dict[int, set[ObjectName]] = {}
        self._taken: set[tuple[int, str]] = set()
        self._exhausted = False

    def give(self, name: ObjectName, ports: Collection[ServicePort], health_check: int) -> None:
        """Marks numbers as taken that a manifest gives; they need not be in range."""
        for port in ports:
            if port.node_port:
                self._take(name, port.node_port, port.protocol)
        if health_check:
            self._take(name, health_check, "TCP")

    def withhold(self, numbers: Collection[int]) -> None:
        """Marks numbers as taken by somebody else."""
        for number in numbers:
            self._holders.setdefault(number, set()).add(_SOMEBODY)

    def keep(self, name: ObjectName, ports: Mapping[str, int], wanted: Mapping[str, int]) -> dict[str, int]:
        """Takes those of `ports` that are wanted, in range and free."""
        kept = {}
        for key, number in ports.items():
            protocol = key.rpartition("/")[2]
            if key in wanted and self._first <= number <= self._last and self._free(name, number, protocol):
                self._take(name, number, protocol)
                kept[key] = number
        return kept

    def new(self, name: ObjectName, port: ServicePort, siblings: Collection[int]) -> int:
        """Takes a free number: one of `siblings` if possible, else one by name; 0 if there is none."""
        for number in siblings:
            if self._first <= number <= self._last and self._free(name, number, port.protocol):
                self._take(name, number, port.protocol)
                return number
        if self._exhausted:
            return 0
        for number in _probe(name, self._first, self._last, salt=port_key(port)):
            if number not in self._holders:
                self._take(name, number, port.protocol)
                return number
        self._exhausted = True
        return 0

    def _free(self, name: ObjectName, number: int, protocol: str) -> bool:
        return self._holders.get(number, {name}) == {name} and (number, protocol) not in self._taken

    def _take(self, name: ObjectName, number: int, protocol: str) -> None:
        self._holders.setdefault(number, set()).add(name)
        self._taken.add((number, protocol))


def _usable(network: _Network) -> tuple[int, int]:
    """The first and the last address to allocate: neither the network's own nor its broadcast address."""
    first = int(network.network_address)
    last = first + network.num_addresses - 1
    return (first + 1, last - 1) if last > first + 1 else (first, last)


def _probe(
    name: ObjectName, first: int, last: int, *, salt: str = "", closed: Sequence[tuple[int, int]] = ()
) -> Iterator[int]:
    """Every number from `first` to `last`, but for closed ranges, once. The name says which comes first."""
    start = first + zlib.crc32(f"{name}/{salt}".encode()) % (last - first + 1)
    yield from _without(start, last, closed)
    yield from _without(first, start - 1, closed)


def _without(first: int, last: int, closed: Sequence[tuple[int, int]]) -> Iterator[int]:
    for low, high in closed:
        if low <= last and high >= first:
            yield from range(first, low)
            first = max(first, high + 1)
    yield from range(first, last + 1)
