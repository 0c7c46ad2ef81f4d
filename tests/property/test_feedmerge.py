"""Manifests and a cluster merged: one change after another comes to what all at once does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxyd.api.discovery import EndpointSlice
from proxyd.api.meta import ObjectMeta, ObjectName
from proxyd.api.service import Service, ServicePort, ServiceSpec, ServiceType
from proxyd.control.feeds.merge import SnapshotMerger, TakenByCluster
from proxyd.state.snapshot import Snapshot

NAMES = [ObjectName("prod", name) for name in "abc"]


def some_service(name: ObjectName, ip: str, node_port: int) -> Service:
    return Service(
        metadata=ObjectMeta(namespace=name.namespace, name=name.name),
        spec=ServiceSpec(
            type=ServiceType.NODE_PORT, cluster_ips=(ip,), ports=(ServicePort(port=80, node_port=node_port),)
        ),
    )


def some_slice(name: ObjectName, family: str) -> tuple[EndpointSlice, ...]:
    return (
        EndpointSlice(metadata=ObjectMeta(namespace=name.namespace, name=name.name), address_type=family),
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    services = draw(st.lists(st.sampled_from(NAMES), unique=True))
    slices = draw(st.lists(st.sampled_from(NAMES), unique=True))
    return Snapshot(
        services={
            name: some_service(
                name, draw(st.sampled_from(["10.96.0.1", "10.96.0.2"])), draw(st.sampled_from([0, 30080]))
            )
            for name in services
        },
        slices={name: some_slice(name, draw(st.sampled_from(["IPv4", "IPv6"]))) for name in slices},
    )


@given(st.lists(st.tuples(snapshots(), snapshots()), min_size=1, max_size=5), st.data())
def test_a_merger_that_remembers_answers_like_a_new_one(
    states: list[tuple[Snapshot, Snapshot]], data: st.DataObject
) -> None:
    merger = SnapshotMerger()
    manifests, cluster = Snapshot(), Snapshot()
    for new_manifests, new_cluster in states:
        # Mostly one of the two stays as it was.
        which = data.draw(st.sampled_from(["manifests", "cluster", "both"]))
        manifests = manifests if which == "cluster" else new_manifests
        cluster = cluster if which == "manifests" else new_cluster
        merged, fresh = merger.merge(manifests, cluster), SnapshotMerger()
        assert merged == fresh.merge(manifests, cluster)
        assert (
            merger.hidden
            == fresh.hidden
            == tuple(sorted(manifests.services.keys() & cluster.services.keys()))
        )
        assert merger.merge(manifests, cluster) is merged


@given(snapshots(), snapshots())
def test_a_service_and_its_slices_come_from_one_source(manifests: Snapshot, cluster: Snapshot) -> None:
    merged = SnapshotMerger().merge(manifests, cluster)
    assert merged.services.keys() == manifests.services.keys() | cluster.services.keys()
    for name, service in merged.services.items():
        source = cluster if name in cluster.services else manifests
        assert service is source.services[name]
        assert merged.slices.get(name) is source.slices.get(name)


@given(st.lists(snapshots(), max_size=5))
def test_what_a_cluster_has_is_taken(states: list[Snapshot]) -> None:
    taken = TakenByCluster()
    for state in states:
        before = taken.now
        changed = taken.update(state.services)
        services = state.services.values()
        assert taken.now.addresses == {ip for service in services for ip in service.spec.cluster_ips}
        assert taken.now.node_ports == {
            port.node_port for service in services for port in service.spec.ports if port.node_port
        }
        assert changed or taken.now is before
