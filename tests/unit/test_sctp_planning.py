"""SCTP in the desired state: which addresses make one endpoint, which endpoints have several."""

from __future__ import annotations

import pytest

from proxyd.api.discovery import EndpointPort, EndpointSlice, SliceEndpoint
from proxyd.api.meta import ObjectMeta
from proxyd.api.service import (
    LoadBalancerIngress,
    LoadBalancerStatus,
    Protocol,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
    ServiceType,
    TrafficPolicy,
)
from proxyd.state.desired import DesiredState, Planner, desired_state
from proxyd.state.plan import plan
from proxyd.state.snapshot import NodeAddress, NodeView, Options, Snapshot, VipMode
from proxyd.state.spec import ListenerKey, Role

FURTHER = "proxyd.io/sctp-addresses"
OF_ENDPOINTS = "proxyd.io/sctp-endpoint-addresses"
NODE = NodeView(
    name="n1",
    addresses=(
        NodeAddress(ip="192.0.2.1", interface="eth0"),
        NodeAddress(ip="198.51.100.1", interface="eth1"),
    ),
)
OPTIONS = Options(
    protocols=frozenset({"TCP", "UDP", "SCTP"}),
    vip_ranges=("10.96.0.0/15", "fd00:96::/112"),
    steer_external_ips=True,
)


def service(name="hss", *, annotations=None, status=None, port=3868, **spec) -> Service:
    spec.setdefault("ports", (ServicePort(port=port, protocol=Protocol.SCTP),))
    spec.setdefault("cluster_ip", "10.96.0.10")
    return Service(
        metadata=ObjectMeta(name=name, annotations=annotations or {}, creation_timestamp=name),
        spec=ServiceSpec(**spec),
        status=status or ServiceStatus(),
    )


def snapshot(*services: Service, v4=("10.1.0.7", "10.1.0.8"), v6=(), annotations=None) -> Snapshot:
    found = {}
    for one in services:
        ports = tuple(EndpointPort(name=p.name, protocol=p.protocol, port=3868) for p in one.spec.ports)
        found[one.metadata.key] = tuple(
            EndpointSlice(
                metadata=ObjectMeta(name=family, annotations=annotations or {}),
                address_type=family,
                endpoints=tuple(SliceEndpoint(addresses=(ip,), node_name="n1") for ip in ips),
                ports=ports,
            )
            for family, ips in (("IPv4", v4), ("IPv6", v6))
        )
    return Snapshot(services={one.metadata.key: one for one in services}, slices=found)


def desired(*services: Service, options=OPTIONS, node=NODE, **endpoints) -> DesiredState:
    return desired_state(snapshot(*services, **endpoints), node, options)


def homes(state: DesiredState) -> list[set[str]]:
    """The addresses of each SCTP endpoint that has any, as sets of texts; single listeners are left out."""
    found: dict[object, set[str]] = {}
    for key, listener in state.host.listeners.items():
        if listener.home is not None:
            found.setdefault(listener.home, set()).add(key.ip)
    return sorted(found.values(), key=sorted)


def test_all_addresses_of_a_port_make_one_endpoint() -> None:
    one = service(
        cluster_ips=("10.96.0.10", "fd00:96::10"),
        external_ips=("192.0.2.1",),
        annotations={FURTHER: "10.97.0.10, 198.51.100.1"},
    )
    state = desired(one)
    assert homes(state) == [{"10.96.0.10", "fd00:96::10", "192.0.2.1", "10.97.0.10", "198.51.100.1"}]
    assert {listener.balancer.family for listener in state.host.listeners.values()} == {4}
    # Of the annotation's addresses those of the service range are made local, the node's own are as they are.
    assert state.host.vips == {"10.96.0.10", "fd00:96::10", "10.97.0.10"}
    roles = {key.ip: listener.role for key, listener in state.host.listeners.items()}
    assert roles["10.97.0.10"] == roles["198.51.100.1"] == Role.SCTP_ADDRESS


def test_ports_have_endpoints_of_their_own() -> None:
    ports = (
        ServicePort(port=3868, name="a", protocol=Protocol.SCTP),
        ServicePort(port=3869, name="b", protocol=Protocol.SCTP),
        ServicePort(port=3868, name="t"),
    )
    state = desired(service(ports=ports, external_ips=("192.0.2.1",)))
    assert homes(state) == [{"10.96.0.10", "192.0.2.1"}] * 2
    tcp = [key for key, listener in state.host.listeners.items() if listener.home is None]
    assert {key.protocol for key in tcp} == {Protocol.TCP}


def test_another_policy_or_source_ranges_make_another_endpoint() -> None:
    ingress = LoadBalancerStatus(ingress=(LoadBalancerIngress(ip="192.0.2.1"),))
    one = service(
        type=ServiceType.LOAD_BALANCER,
        external_ips=("198.51.100.1",),
        load_balancer_source_ranges=("203.0.113.0/24",),
        status=ServiceStatus(load_balancer=ingress),
    )
    assert homes(desired(one)) == [{"10.96.0.10", "198.51.100.1"}, {"192.0.2.1"}]
    local = service(external_ips=("198.51.100.1",), external_traffic_policy=TrafficPolicy.LOCAL)
    assert homes(desired(local)) == [{"10.96.0.10"}, {"198.51.100.1"}]


def test_node_ports_are_single() -> None:
    one = service(
        type=ServiceType.NODE_PORT, ports=(ServicePort(port=3868, protocol=Protocol.SCTP, node_port=30068),)
    )
    state = desired(one)
    assert homes(state) == [{"10.96.0.10"}]
    assert ListenerKey("198.51.100.1", 30068, Protocol.SCTP) in state.host.listeners


def test_an_endpoint_of_both_families_takes_the_endpoints_of_the_first_that_has_any() -> None:
    one = service(cluster_ips=("10.96.0.10", "fd00:96::10"))
    for v4, v6, family in ((("10.1.0.7",), ("fd00::7",), 4), ((), ("fd00::7",), 6)):
        state = desired(one, v4=v4, v6=v6)
        assert homes(state) == [{"10.96.0.10", "fd00:96::10"}]
        assert {listener.balancer.family for listener in state.host.listeners.values()} == {family}
    assert not desired(one, v4=()).host.listeners


def test_a_lost_address_does_not_take_the_others_along() -> None:
    first = service("a", cluster_ip="10.96.0.20", external_ips=("192.0.2.1",))
    second = service("b", external_ips=("192.0.2.1", "198.51.100.1"))
    state = desired(first, second)
    assert homes(state) == [{"10.96.0.10", "198.51.100.1"}, {"10.96.0.20", "192.0.2.1"}]
    assert [str(status) for status in state.unopened] == [
        "Conflict: 192.0.2.1:3868/SCTP is held by default/a"
    ]


def test_an_address_that_comes_or_goes_leaves_the_others_alone() -> None:
    planner = Planner()
    before = planner.desired(snapshot(service(annotations={FURTHER: "10.97.0.10"})), NODE, OPTIONS)
    after = planner.desired(snapshot(service(annotations={FURTHER: "10.97.0.11"})), NODE, OPTIONS)
    todo = plan(before.host, after.host)
    assert [spec.key.ip for spec in todo.open] == ["10.97.0.11"]
    assert [key.ip for key in todo.close] == ["10.97.0.10"]
    assert not todo.change
    # A first IPv6 address needs a socket of another family, for all.
    mixed = planner.desired(snapshot(service(annotations={FURTHER: "10.97.0.11,fd00:96::1"})), NODE, OPTIONS)
    todo = plan(after.host, mixed.host)
    assert {spec.key.ip for spec in todo.open} == {"10.96.0.10", "10.97.0.11", "fd00:96::1"}
    assert {key.ip for key in todo.close} == {"10.96.0.10", "10.97.0.11"}


def test_foreign_addresses_are_not_steered() -> None:
    state = desired(service(external_ips=("203.0.113.9",)))
    assert not state.host.steering
    assert not state.host.listeners[ListenerKey("203.0.113.9", 3868, Protocol.SCTP)].steered
    # Nor made local whole, which would take all other ports of a foreign host.
    assert desired(service(annotations={FURTHER: "203.0.113.9"})).host.vips == {"10.96.0.10"}


def test_further_addresses_in_loopback_mode() -> None:
    options = Options(
        vip_mode=VipMode(loopback=True), steer_external_ips=False, protocols=frozenset({"SCTP"}), vip_ranges=("10.96.0.0/15",)
    )  # fmt: skip
    state = desired(service(annotations={FURTHER: "10.97.0.10"}), options=options)
    assert homes(state) == [{"127.96.0.10", "127.97.0.10"}]


@pytest.mark.parametrize("where", ["service", "slice"])
def test_further_addresses_of_endpoints(where: str) -> None:
    said = {OF_ENDPOINTS: "10.1.0.7=10.2.0.7,fd00::7; 10.9.9.9=10.9.9.10"}
    one = service(annotations=said if where == "service" else None)
    state = desired(one, annotations=said if where == "slice" else None)
    (balancer,) = state.host.balancers.values()
    assert balancer.further == {"10.1.0.7": ("10.2.0.7", "fd00::7")}


def test_a_slice_knows_better_than_its_service() -> None:
    one = service(annotations={OF_ENDPOINTS: "10.1.0.7=10.2.0.7; 10.1.0.8=10.2.0.8"})
    state = desired(one, annotations={OF_ENDPOINTS: "10.1.0.7=10.3.0.7"})
    (balancer,) = state.host.balancers.values()
    assert balancer.further == {"10.1.0.7": ("10.3.0.7",), "10.1.0.8": ("10.2.0.8",)}


@pytest.mark.parametrize("forbidden", ["127.0.0.1", "169.254.1.1", "10.96.0.77", "::1", "127.96.0.4"])
def test_addresses_that_no_endpoint_may_have_are_left_out(forbidden: str) -> None:
    said = {OF_ENDPOINTS: f"10.1.0.7={forbidden},10.2.0.7"}
    (balancer,) = desired(service(annotations=said)).host.balancers.values()
    assert balancer.further == {"10.1.0.7": ("10.2.0.7",)}


def test_tcp_ports_of_the_same_service_know_nothing_of_it() -> None:
    said = {FURTHER: "10.97.0.10", OF_ENDPOINTS: "10.1.0.7=10.2.0.7"}
    state = desired(service(annotations=said, ports=(ServicePort(port=80),)))
    assert [key.ip for key in state.host.listeners] == ["10.96.0.10"]
    (balancer,) = state.host.balancers.values()
    assert not balancer.further


def test_with_the_gate_off_every_address_says_so() -> None:
    off = Options(protocols=frozenset({"TCP", "UDP"}))
    state = desired(service(annotations={FURTHER: "198.51.100.1"}), options=off)
    assert not state.host.listeners
    assert {(status.key.ip, str(status)) for status in state.unopened} == {
        ("10.96.0.10", "Disabled: SCTPSupport"),
        ("198.51.100.1", "Disabled: SCTPSupport"),
    }
