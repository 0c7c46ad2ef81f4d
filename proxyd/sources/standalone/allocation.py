"""Allocates clusterIPs, nodePorts and creation times to Services that were written without them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime, timedelta
from ipaddress import ip_address, ip_network
from typing import NamedTuple

import msgspec

from proxyd.api.addresses import Network
from proxyd.api.meta import ObjectName
from proxyd.api.service import Service, ServiceType
from proxyd.sources.standalone.pools import AddressPool, NodePortPool, port_key
from proxyd.state.occupied import Occupied

# So many Services that are absent at the moment (rejected, or in an unreadable file) keep their allocations.
MAX_ABSENT = 10_000

_FAMILY_NAMES = {4: "IPv4", 6: "IPv6"}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The ranges to allocate from.

    Attributes:
        cluster_cidrs: one range, or one of each family; the first one's family is the default.
        node_port_range: (first, last), both included.
    """

    cluster_cidrs: tuple[str, ...] = ("10.96.0.0/16",)
    node_port_range: tuple[int, int] = (30000, 32767)


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses (in canonical form), nodePorts and networks of others: they are never allocated."""

    addresses: frozenset[str] = frozenset()
    node_ports: frozenset[int] = frozenset()
    networks: frozenset[str] = frozenset()  # CIDRs that the node is connected to

    def __or__(self, other: Taken) -> Taken:
        return Taken(
            addresses=self.addresses | other.addresses,
            node_ports=self.node_ports | other.node_ports,
            networks=self.networks | other.networks,
        )


NOTHING_TAKEN = Taken()


def taken_around(occupied: Occupied, ranges: Collection[str]) -> Taken:
    """What of the service ranges is in use around the node."""
    wanted = [ip_network(cidr, strict=False) for cidr in ranges]
    ips = (ip for ip, _ in occupied.addresses if any(ip_address(ip) in one for one in wanted))
    networks = (
        cidr for cidr, _ in occupied.networks if any(_overlap(ip_network(cidr), one) for one in wanted)
    )
    return Taken(addresses=frozenset(ips), networks=frozenset(networks))


def _overlap(one: Network, other: Network) -> bool:
    return one.network_address in other or other.network_address in one


class Allocation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What has been allocated to one Service.

    Attributes:
        created: creation time in RFC 3339; "" where the manifest gives it.
        cluster_ips: at most one of each family.
        node_ports: by "name/protocol" of the service port, or "number/protocol" where it has no name.
    """

    created: str = ""
    cluster_ips: tuple[str, ...] = ()
    node_ports: Mapping[str, int] = {}


class Allocations(msgspec.Struct, frozen=True, kw_only=True):
    """All allocations. They are kept between runs, so that a restart changes nothing."""

    services: Mapping[ObjectName, Allocation] = {}


class Shortage(NamedTuple):
    """Why something could not be allocated to a Service, and the path of the field that lacks it."""

    service: ObjectName
    path: str
    message: str


class Allocated(msgspec.Struct, frozen=True, kw_only=True):
    """The Services with their allocations filled in, the allocations to keep, and what was lacking."""

    services: Mapping[ObjectName, Service]
    allocations: Allocations
    shortages: tuple[Shortage, ...] = ()


def allocate(
    services: Mapping[ObjectName, Service],
    previous: Allocations,
    settings: Settings,
    now: str,
    *,
    absent: Callable[[ObjectName], bool] = lambda _: False,
    taken: Taken = NOTHING_TAKEN,
) -> Allocated:
    """Allocates to every Service what it lacks. The result does not depend on the order of `services`.

    An address or port that a manifest gives is never allocated, and an allocation that a manifest claims
    later moves. A Service keeps its allocations as long as they are wanted, in range and not claimed. After
    that new ones are chosen, in the order of creation time, then name. A manifest may give addresses outside
    the range. Where two manifests give the same one both keep it: planning decides between them.

    Args:
        services: all valid Services.
        previous: what an earlier call returned.
        settings: the ranges.
        now: RFC 3339 with microseconds, UTC; the creation time of new Services that have none. If the clock
            has gone back, they are a microsecond younger than the youngest in `previous`.
        absent: whether a Service that is not in `services` may still exist (rejected, or in an unreadable
            file): its allocations stay reserved.
        taken: what others have; an allocation that is among it moves.
    """
    return _Allocator(services, previous, settings, now).run(absent, taken)


class _Allocator:
    def __init__(
        self, services: Mapping[ObjectName, Service], previous: Allocations, settings: Settings, now: str
    ) -> None:
        self._previous = previous.services
        now = _after(previous.services.values(), now)
        self._services: dict[ObjectName, Service] = {}
        for name, service in services.items():
            known = self._previous.get(name, Allocation())
            self._services[name] = _dated(service, known.created or now)
        self._given_created = {name for name, item in services.items() if item.metadata.creation_timestamp}
        self._order = sorted(self._services, key=lambda n: (self._services[n].metadata.creation_timestamp, n))
        self._ips = AddressPool(settings.cluster_cidrs)
        self._ports = NodePortPool(settings.node_port_range)
        self._shortages: list[Shortage] = []

    def run(self, absent: Callable[[ObjectName], bool], taken: Taken) -> Allocated:
        self._ips.withhold(taken.addresses)
        self._ips.withhold_networks(taken.networks)
        self._overlapping = ", ".join(sorted(taken.networks))
        self._ports.withhold(taken.node_ports)
        wanted_ips = {name: self._wanted_families(self._services[name]) for name in self._order}
        wanted_ports = {name: _wanted_ports(self._services[name]) for name in self._order}
        for name in self._order:
            spec = self._services[name].spec
            self._ips.give(spec.all_cluster_ips)
            self._ports.give(name, spec.ports, spec.health_check_node_port)
        ips: dict[ObjectName, dict[int, str]] = {}
        ports: dict[ObjectName, dict[str, int]] = {}
        for name in self._order:
            known = self._previous.get(name, Allocation())
            ips[name] = self._ips.keep(known.cluster_ips, wanted_ips[name])
            ports[name] = self._ports.keep(name, known.node_ports, wanted_ports[name])
        kept = self._keep_absent(absent)
        for name in self._order:
            self._new_addresses(name, wanted_ips[name], ips[name])
            self._new_ports(name, wanted_ports[name], ports[name])
        entries = kept
        filled = {}
        for name in self._order:
            service = self._services[name]
            created = "" if name in self._given_created else service.metadata.creation_timestamp
            entry = Allocation(
                created=created,
                cluster_ips=tuple(ips[name].values()),
                node_ports=dict(sorted(ports[name].items())),
            )
            if entry != Allocation():
                entries[name] = entry
            filled[name] = _fill(service, ips[name], ports[name])
        return Allocated(
            services=filled,
            allocations=Allocations(services=dict(sorted(entries.items()))),
            shortages=tuple(self._shortages),
        )

    def _keep_absent(self, absent: Callable[[ObjectName], bool]) -> dict[ObjectName, Allocation]:
        """The allocations of absent Services, without what has been claimed meanwhile."""
        gone = [name for name in sorted(self._previous) if name not in self._services and absent(name)]
        kept = {}
        for name in gone[:MAX_ABSENT]:
            known = self._previous[name]
            kept[name] = Allocation(
                created=known.created,
                cluster_ips=tuple(self._ips.keep(known.cluster_ips, (4, 6)).values()),
                node_ports=self._ports.keep(name, known.node_ports, known.node_ports),
            )
        return kept

    def _wanted_families(self, service: Service) -> tuple[int, ...]:
        """The IP versions of the clusterIPs that are to be allocated to the Service."""
        spec = service.spec
        if spec.type is ServiceType.EXTERNAL_NAME or spec.headless:
            return ()
        given = [_version(ip) for ip in spec.all_cluster_ips]
        asked = [4 if family == "IPv4" else 6 for family in spec.ip_families]
        available = self._ips.families
        dual = spec.ip_family_policy in {"PreferDualStack", "RequireDualStack"} or len(asked) > 1
        wanted = given or asked[:1] or list(available[:1])
        if dual:
            wanted = list(dict.fromkeys((*wanted, *asked, *available)))
            if spec.ip_family_policy == "RequireDualStack" or len(asked) > 1:
                wanted = list(dict.fromkeys((*wanted, 4, 6)))
        lacking = tuple(version for version in wanted if version not in given)
        for version in lacking:
            if version not in available and (
                spec.ip_family_policy != "PreferDualStack" or wanted == [version]
            ):
                self._lacks(
                    service.metadata.key,
                    "spec.ipFamilies",
                    f"no {_FAMILY_NAMES[version]} clusterIP: "
                    "there is no such range in --service-cluster-ip-range",
                )
        return tuple(version for version in lacking if version in available)

    def _new_addresses(self, name: ObjectName, wanted: Collection[int], have: dict[int, str]) -> None:
        for version in wanted:
            if version in have:
                continue
            address = self._ips.new(name, version)
            if address:
                have[version] = address
            else:
                self._lacks(
                    name,
                    "spec.clusterIP",
                    f"no {_FAMILY_NAMES[version]} address is left in --service-cluster-ip-range: "
                    + (
                        f"networks of this node ({self._overlapping}) overlap it; choose another range"
                        if self._overlapping
                        else "widen it, or give one"
                    ),
                )

    def _new_ports(self, name: ObjectName, wanted: Mapping[str, int], have: dict[str, int]) -> None:
        for index, port in enumerate(self._services[name].spec.ports):
            key = port_key(port)
            if key not in wanted or key in have:
                continue
            siblings = [
                other.node_port or have.get(port_key(other), 0)
                for other in self._services[name].spec.ports
                if other.port == port.port and other is not port
            ]
            number = self._ports.new(name, port, siblings)
            if number:
                have[key] = number
            else:
                self._lacks(
                    name,
                    f"spec.ports[{index}].nodePort",
                    "no port is left in --service-node-port-range: widen it, or give one",
                )

    def _lacks(self, service: ObjectName, path: str, message: str) -> None:
        self._shortages.append(Shortage(service, path, message))


def _after(known: Iterable[Allocation], now: str) -> str:
    """The time now, or the microsecond after the last creation: who comes later is younger by any clock."""
    last = max((allocation.created for allocation in known), default="")
    if now > last:
        return now
    try:
        then = datetime.fromisoformat(last) + timedelta(microseconds=1)
    except (ValueError, OverflowError):  # not from this program
        return last
    return then.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _dated(service: Service, created: str) -> Service:
    """The Service with its own creation time, or else with `created`."""
    if service.metadata.creation_timestamp:
        return service
    metadata = msgspec.structs.replace(service.metadata, creation_timestamp=created)
    return msgspec.structs.replace(service, metadata=metadata)


def _wanted_ports(service: Service) -> dict[str, int]:
    """The keys of service ports that are to get a nodePort, and the `port` of each."""
    spec = service.spec
    exposed = spec.type is ServiceType.NODE_PORT or (
        spec.type is ServiceType.LOAD_BALANCER and spec.allocate_load_balancer_node_ports
    )
    return {port_key(port): port.port for port in spec.ports if exposed and not port.node_port}


def _fill(service: Service, ips: Mapping[int, str], ports: Mapping[str, int]) -> Service:
    """The Service with its allocations in `spec`."""
    if not ips and not ports:
        return service
    spec = service.spec
    if ips:
        addresses = (*spec.all_cluster_ips, *ips.values())
        spec = msgspec.structs.replace(
            spec,
            cluster_ip=addresses[0],
            cluster_ips=addresses,
            ip_families=tuple(_FAMILY_NAMES[_version(ip)] for ip in addresses),
        )
    if ports:
        filled = (
            msgspec.structs.replace(port, node_port=ports[port_key(port)])
            if port_key(port) in ports
            else port
            for port in spec.ports
        )
        spec = msgspec.structs.replace(spec, ports=tuple(filled))
    return msgspec.structs.replace(service, spec=spec)


def _version(address: str) -> int:
    return 6 if ":" in address else 4
