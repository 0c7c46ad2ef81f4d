"""Allocations and assembly, over random Services: nothing collides, and nothing depends on order or on running again."""

from __future__ import annotations

import random
from ipaddress import ip_address, ip_network

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from proxyd.api.meta import ObjectMeta, ObjectName
from proxyd.api.pod import Pod, PodStatus
from proxyd.api.service import Protocol, Service, ServicePort, ServiceSpec, ServiceType
from proxyd.sources.manifests.source import ManifestSet
from proxyd.sources.standalone.allocation import Allocated, Allocation, Allocations, Settings, allocate
from proxyd.sources.standalone.assemble import assemble

NOW = "2026-01-02T03:04:05.000006Z"
# Small pools, so that they run out and collide.
SETTINGS = [
    Settings(cluster_cidrs=("10.96.0.0/29",), node_port_range=(30000, 30004)),
    Settings(cluster_cidrs=("10.96.0.0/29", "fd00:96::/125"), node_port_range=(30000, 30004)),
    Settings(cluster_cidrs=("fd00:96::/120", "10.96.0.0/30"), node_port_range=(30002, 30009)),
]
NAMES = [ObjectName(namespace, name) for namespace in ("prod", "dev") for name in ("a", "b", "c", "d")]

ports = st.lists(
    st.builds(
        ServicePort,
        port=st.sampled_from([53, 80]),
        name=st.sampled_from(["x", "y", "z"]),
        protocol=st.sampled_from(list(Protocol)),
        node_port=st.sampled_from([0, 0, 0, 30000, 30001, 31999]),
    ),
    min_size=1,
    max_size=3,
    unique_by=(
        lambda port: port.name,
        lambda port: (port.port, port.protocol),
        lambda port: (port.node_port or port.name, port.protocol),  # as validation has it
    ),
).map(tuple)


@st.composite
def service(draw: st.DrawFn, name: ObjectName) -> Service:
    kind = draw(st.sampled_from(list(ServiceType)))
    given_ips = draw(
        st.sampled_from([(), (), ("10.96.0.1",), ("10.96.0.2",), ("None",), ("172.16.0.1", "fd00:96::3")])
    )
    chosen = draw(ports)
    if kind not in {ServiceType.NODE_PORT, ServiceType.LOAD_BALANCER}:
        chosen = tuple(msgspec.structs.replace(port, node_port=0) for port in chosen)
    return Service(
        metadata=ObjectMeta(
            namespace=name.namespace,
            name=name.name,
            creation_timestamp=draw(st.sampled_from(["", "", "2020-01-01T00:00:00Z"])),
        ),
        spec=ServiceSpec(
            type=kind,
            selector=draw(st.sampled_from([{}, {"app": "a"}, {"app": "a", "tier": "t"}])),
            ports=chosen,
            cluster_ip=given_ips[0] if given_ips else "",
            cluster_ips=given_ips,
            ip_families=draw(st.sampled_from([(), (), ("IPv6",), ("IPv4", "IPv6")])),
            ip_family_policy=draw(
                st.sampled_from(["", "SingleStack", "PreferDualStack", "RequireDualStack"])
            ),
            allocate_load_balancer_node_ports=draw(st.booleans()),
        ),
    )


@st.composite
def all_services(draw: st.DrawFn) -> dict[ObjectName, Service]:
    return {name: draw(service(name)) for name in draw(st.lists(st.sampled_from(NAMES), unique=True))}


previous = st.builds(
    Allocations,
    services=st.dictionaries(
        st.sampled_from(NAMES),
        st.builds(
            Allocation,
            created=st.sampled_from(["", "2025-01-01T00:00:00Z"]),
            cluster_ips=st.lists(st.sampled_from(["10.96.0.1", "10.96.0.3", "fd00:96::2", "1.1.1.1"])).map(
                tuple
            ),
            node_ports=st.dictionaries(
                st.sampled_from(["x/TCP", "y/TCP", "x/UDP"]), st.sampled_from([30000, 30002, 30003, 65000])
            ),
        ),
    ),
)
settings_ = st.sampled_from(SETTINGS)


def shuffled(services: dict[ObjectName, Service]) -> dict[ObjectName, Service]:
    items = list(services.items())
    random.Random(len(items)).shuffle(items)
    return dict(items)


def check(services: dict[ObjectName, Service], result: Allocated, settings: Settings) -> None:
    """Nothing that was handed out is given by a manifest or handed out twice, and all of it is in range."""
    given_ips = {ip for item in services.values() for ip in item.spec.all_cluster_ips}
    given_ports = {
        (port.node_port, name)
        for name, item in services.items()
        for port in item.spec.ports
        if port.node_port
    }
    handed_ips: list[str] = []
    holders: dict[int, ObjectName] = {}
    pairs: list[tuple[int, str]] = []
    networks = [ip_network(cidr) for cidr in settings.cluster_cidrs]
    for name, entry in result.allocations.services.items():
        handed_ips += entry.cluster_ips
        for key, number in entry.node_ports.items():
            assert settings.node_port_range[0] <= number <= settings.node_port_range[1]
            assert holders.setdefault(number, name) == name
            assert not any(number == taken and name != owner for taken, owner in given_ports)
            pairs.append((number, key.rpartition("/")[2]))
    pairs += [
        (port.node_port, port.protocol)
        for name, item in services.items()
        for port in item.spec.ports
        if port.node_port in holders
    ]
    assert len(pairs) == len(set(pairs))
    assert len(handed_ips) == len(set(handed_ips))
    assert not given_ips.intersection(handed_ips)
    for ip in handed_ips:
        (network,) = [each for each in networks if each.version == ip_address(ip).version]
        assert ip_address(ip) in network
        assert ip_address(ip) not in {network.network_address, network.broadcast_address}


@given(all_services(), previous, settings_)
def test_allocation_never_collides(
    services: dict[ObjectName, Service], before: Allocations, settings: Settings
) -> None:
    check(services, allocate(services, before, settings, NOW), settings)
    check(services, allocate(services, before, settings, NOW, absent=lambda _: True), settings)


@given(all_services(), previous, settings_)
def test_every_need_is_met_or_said(
    services: dict[ObjectName, Service], before: Allocations, settings: Settings
) -> None:
    result = allocate(services, before, settings, NOW)
    said = {shortage.service for shortage in result.shortages}
    for name, item in result.services.items():
        assert item.metadata.creation_timestamp
        if name in said or item.spec.type is ServiceType.EXTERNAL_NAME or item.spec.headless:
            continue
        assert item.spec.all_cluster_ips
        wants = item.spec.type is ServiceType.NODE_PORT or (
            item.spec.type is ServiceType.LOAD_BALANCER and item.spec.allocate_load_balancer_node_ports
        )
        assert not wants or all(port.node_port for port in item.spec.ports)


@given(all_services(), previous, settings_)
def test_running_again_changes_nothing(
    services: dict[ObjectName, Service], before: Allocations, settings: Settings
) -> None:
    first = allocate(services, before, settings, NOW)
    again = allocate(services, first.allocations, settings, "2030-01-01T00:00:00Z")
    assert again.services == first.services
    assert again.allocations == first.allocations
    assert again.shortages == first.shortages


@given(all_services(), all_services(), settings_)
def test_others_coming_and_going_move_nothing_but_what_they_give(
    some: dict[ObjectName, Service], others: dict[ObjectName, Service], settings: Settings
) -> None:
    first = allocate(some, Allocations(), settings, NOW)
    given_ips = {ip for item in others.values() for ip in item.spec.all_cluster_ips}
    second = allocate({**others, **some}, first.allocations, settings, NOW)
    for name in some:
        for ip in first.services[name].spec.all_cluster_ips:
            assert ip in second.services[name].spec.all_cluster_ips or ip in given_ips


@given(all_services(), previous, settings_)
def test_the_order_of_services_does_not_matter(
    services: dict[ObjectName, Service], before: Allocations, settings: Settings
) -> None:
    assert allocate(shuffled(services), before, settings, NOW) == allocate(services, before, settings, NOW)


pods = st.dictionaries(
    st.sampled_from([ObjectName("prod", f"p{n}") for n in range(6)]),
    st.tuples(
        st.sampled_from([{"app": "a"}, {"app": "a", "tier": "t"}, {}]),
        st.sampled_from(["10.244.0.1", "10.244.0.2", "fd00::1", ""]),
    ),
).map(
    lambda chosen: {
        name: Pod(
            metadata=ObjectMeta(namespace=name.namespace, name=name.name, labels=labels),
            status=PodStatus(pod_ip=ip),
        )
        for name, (labels, ip) in chosen.items()
    }
)


@given(all_services(), pods, settings_)
def test_assembling_is_a_function_of_the_objects(
    services: dict[ObjectName, Service], some: dict[ObjectName, Pod], settings: Settings
) -> None:
    one = assemble(ManifestSet(services=services, pods=some), Allocations(), settings, NOW)
    two = assemble(
        ManifestSet(services=shuffled(services), pods=dict(reversed(some.items()))),
        Allocations(),
        settings,
        NOW,
    )
    assert one == two
    assert all(name in services for name in one.snapshot.slices)
