"""Merges the snapshots of manifests and of the cluster into one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from proxyd.api.discovery import EndpointSlice
from proxyd.api.meta import ObjectName
from proxyd.api.service import Service
from proxyd.sources.standalone.allocation import Taken
from proxyd.state.changes import Derived, touched
from proxyd.state.snapshot import Snapshot

_Slices = Mapping[ObjectName, tuple[EndpointSlice, ...]]


class SnapshotMerger:
    """Merges one pair of snapshots after another.

    A Service and its slices come from one source. If both have a Service, the cluster's is served, as every
    other node serves that one. What did not change is the same Python object as before; a merge takes time
    for what changed alone.

    Attributes:
        hidden: Services of the manifests that are not served, because the cluster has one of the same name.
    """

    def __init__(self) -> None:
        self.hidden: tuple[ObjectName, ...] = ()
        self._manifests = Snapshot()
        self._cluster = Snapshot()
        self._services: Derived[ObjectName, Service] = Derived()
        self._slices: Derived[ObjectName, tuple[EndpointSlice, ...]] = Derived()
        self._merged = Snapshot(services=self._services, slices=self._slices)

    def merge(self, manifests: Snapshot, cluster: Snapshot) -> Snapshot:
        """The two snapshots merged."""
        due = _touched(self._manifests, manifests) | _touched(self._cluster, cluster)
        new_names = manifests.services.keys() != self._manifests.services.keys()
        new_names = new_names or cluster.services.keys() != self._cluster.services.keys()
        self._manifests, self._cluster = manifests, cluster
        if not due:
            return self._merged
        services: dict[ObjectName, Service | None] = {}
        slices: dict[ObjectName, tuple[EndpointSlice, ...] | None] = {}
        for name in sorted(due):
            source = manifests if name in manifests.services and name not in cluster.services else cluster
            service, some = source.services.get(name), source.slices.get(name)
            if self._services.get(name) is not service:
                services[name] = service
            if self._slices.get(name) is not some:
                slices[name] = some
        if new_names:
            self.hidden = tuple(sorted(manifests.services.keys() & cluster.services.keys()))
        self._services, self._slices = self._services.derive(services), self._slices.derive(slices)
        self._merged = Snapshot(services=self._services, slices=self._slices)
        return self._merged


class TakenByCluster:
    """The addresses and nodePorts that Services of a cluster have."""

    def __init__(self) -> None:
        self._services: Mapping[ObjectName, Service] = {}
        self.now = Taken()

    def update(self, services: Mapping[ObjectName, Service]) -> bool:
        """Take a new state of the Services. Returns whether their addresses or nodePorts have changed."""
        before, self._services = self._services, services
        if all(
            _claims(before.get(name)) == _claims(services.get(name)) for name in touched(before, services)
        ):
            return False
        self.now = _taken(services.values())
        return True


def _touched(before: Snapshot, now: Snapshot) -> set[ObjectName]:
    return touched(before.services, now.services) | touched(before.slices, now.slices)


def _claims(service: Service | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if service is None:
        return (), ()
    spec = service.spec
    numbers = (*(port.node_port for port in spec.ports), spec.health_check_node_port)
    return spec.all_cluster_ips, tuple(number for number in numbers if number)


def _taken(services: Iterable[Service]) -> Taken:
    addresses: set[str] = set()
    numbers: set[int] = set()
    for service in services:
        ips, ports = _claims(service)
        addresses.update(ips)
        numbers.update(ports)
    return Taken(addresses=frozenset(addresses), node_ports=frozenset(numbers))
