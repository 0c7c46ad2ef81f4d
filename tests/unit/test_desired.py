"""What the node should hold for a snapshot."""

from __future__ import annotations

import msgspec

from proxyd.api.discovery import EndpointConditions, EndpointPort, EndpointSlice, SliceEndpoint
from proxyd.api.meta import ObjectMeta, ObjectName
from proxyd.api.service import (
    LoadBalancerIngress,
    LoadBalancerStatus,
    Protocol,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
    ServiceType,
    SessionAffinity,
)
from proxyd.state.desired import NOBODY, DesiredState, desired_state
from proxyd.state.occupied import Occupied, overlaps
from proxyd.state.snapshot import NodeAddress, NodeView, Options, Snapshot, VipMode
from proxyd.state.spec import ListenerKey, Role, ServicePortName, Steering

NODE = NodeView(
    name="n1",
    addresses=(
        NodeAddress(ip="127.0.0.1", interface="lo"),
        NodeAddress(ip="::1", interface="lo"),
        NodeAddress(ip="192.0.2.1", interface="eth0", primary=True),
        NodeAddress(ip="198.51.100.1", interface="eth1"),
    ),
)


def service(name="web", created="", status=None, **spec) -> Service:
    spec.setdefault("ports", (ServicePort(port=80),))
    spec.setdefault("cluster_ip", "10.96.0.10")
    return Service(
        metadata=ObjectMeta(name=name, creation_timestamp=created),
        spec=ServiceSpec(**spec),
        status=status or ServiceStatus(),
    )


def desired(*services: Service, endpoints=True, options=Options(), node=NODE, held=NOBODY) -> DesiredState:  # noqa: B008 - frozen
    slices = {}
    for one in services:
        ports = tuple(EndpointPort(name=p.name, protocol=p.protocol, port=9376) for p in one.spec.ports)
        found = (SliceEndpoint(addresses=("10.0.0.1",), node_name="n1"),) if endpoints else ()
        slices[one.metadata.key] = (
            EndpointSlice(metadata=ObjectMeta(name="s"), endpoints=found, ports=ports),
        )
    snapshot = Snapshot(services={one.metadata.key: one for one in services}, slices=slices)
    return desired_state(snapshot, node, options, held)


def keys(state: DesiredState) -> set[str]:
    return {str(key) for key in state.host.listeners}


def reasons(state: DesiredState) -> dict[str, str]:
    return {str(status.key): str(status) for status in state.unopened}


def test_a_cluster_ip_service_gets_its_vip() -> None:
    state = desired(service())
    assert keys(state) == {"10.96.0.10:80/TCP"}
    assert state.host.vips == {"10.96.0.10"}


def test_a_node_port_is_opened_on_every_admitted_address_of_its_family() -> None:
    one = service(type=ServiceType.NODE_PORT, ports=(ServicePort(port=80, node_port=30036),))
    assert keys(desired(one)) == {
        "10.96.0.10:80/TCP",
        "127.0.0.1:30036/TCP",
        "192.0.2.1:30036/TCP",
        "198.51.100.1:30036/TCP",
    }
    loopback = Options(nodeport_addresses=("127.0.0.0/8",))
    assert keys(desired(one, options=loopback)) == {"10.96.0.10:80/TCP", "127.0.0.1:30036/TCP"}
    primary = Options(nodeport_addresses=("primary",))
    assert keys(desired(one, options=primary)) == {"10.96.0.10:80/TCP", "192.0.2.1:30036/TCP"}
    bound = Options(bind_addresses=("198.51.100.1",))
    assert keys(desired(one, options=bound)) == {"10.96.0.10:80/TCP", "198.51.100.1:30036/TCP"}


def test_external_ips_are_steered_unless_they_are_the_nodes_own() -> None:
    state = desired(service(external_ips=("80.11.12.10", "192.0.2.1")))
    assert keys(state) == {"10.96.0.10:80/TCP", "80.11.12.10:80/TCP", "192.0.2.1:80/TCP"}
    assert state.host.steering == {ListenerKey("80.11.12.10", 80, Protocol.TCP): Steering.LOCAL}
    without = desired(service(external_ips=("80.11.12.10",)), endpoints=False)
    assert without.host.steering == {ListenerKey("80.11.12.10", 80, Protocol.TCP): Steering.UNREACHABLE}


def test_an_endpoint_at_the_nodes_own_address_and_port_has_it() -> None:
    """It may be a server of a Pod in the node's network: a listener there would take its port, or dial itself."""
    one = service(external_ips=("192.0.2.1", "192.0.2.7"), cluster_ip="10.96.0.10")
    port = (EndpointPort(port=80),)
    for ready, status in (
        (True, "Serving: its endpoint has this address and port itself"),
        (False, "NoEndpoints: left to its endpoint at this address and port, which is not ready"),
    ):
        ends = (
            SliceEndpoint(addresses=("192.0.2.1",), conditions=EndpointConditions(ready=ready)),
            SliceEndpoint(addresses=("192.0.2.7",)),
        )
        slices = {
            one.metadata.key: (EndpointSlice(metadata=ObjectMeta(name="s"), endpoints=ends, ports=port),)
        }
        state = desired_state(Snapshot(services={one.metadata.key: one}, slices=slices), NODE, Options())
        # Another node's address is steered, and reached as an endpoint too.
        assert keys(state) == {"10.96.0.10:80/TCP", "192.0.2.7:80/TCP"}
        assert reasons(state) == {"192.0.2.1:80/TCP": status}
    # Where the endpoint has another port there is nothing in the way.
    assert "192.0.2.1:80/TCP" in keys(desired(one))


def test_load_balancer_addresses_with_their_source_ranges() -> None:
    ingress = (
        LoadBalancerIngress(ip="203.0.113.5"),
        LoadBalancerIngress(hostname="lb.example.com"),
        LoadBalancerIngress(ip="203.0.113.6", ip_mode="Proxy"),
    )
    state = desired(
        service(
            type=ServiceType.LOAD_BALANCER,
            load_balancer_source_ranges=(" 10.0.0.0/8 ", "fd00::/8"),
            status=ServiceStatus(load_balancer=LoadBalancerStatus(ingress=ingress)),
        )
    )
    assert keys(state) == {"10.96.0.10:80/TCP", "203.0.113.5:80/TCP"}
    spec = state.host.listeners[ListenerKey("203.0.113.5", 80, Protocol.TCP)]
    assert spec.source_ranges == ("10.0.0.0/8",)
    assert spec.role is Role.LOAD_BALANCER


def test_more_source_ranges_than_workers_can_be_told_admit_nobody() -> None:
    balancer = LoadBalancerStatus(ingress=(LoadBalancerIngress(ip="203.0.113.10"),))
    ranges = tuple(f"10.{n >> 8}.{n & 255}.0/24" for n in range(8000))
    one = service(
        type=ServiceType.LOAD_BALANCER,
        load_balancer_source_ranges=ranges,
        status=ServiceStatus(load_balancer=balancer),
    )
    state = desired(one)
    assert keys(state) == {"10.96.0.10:80/TCP"}
    assert reasons(state) == {
        "203.0.113.10:80/TCP": (
            "Failed: 8000 loadBalancerSourceRanges are more than a listener can have: use larger ranges"
        )
    }


def test_addresses_of_a_family_that_the_service_has_not_are_left_alone() -> None:
    balanced = ServiceStatus(
        load_balancer=LoadBalancerStatus(ingress=(LoadBalancerIngress(ip="2001:db8::5"),))
    )
    given = {
        "type": ServiceType.LOAD_BALANCER,
        "external_ips": ("80.11.12.10", "2001:db8::6"),
        "status": balanced,
    }
    state = desired(service(**given))
    assert keys(state) == {"10.96.0.10:80/TCP", "80.11.12.10:80/TCP"}
    why = (
        "the Service has no IPv6 clusterIP; add IPv6 to spec.ipFamilies, and for manifests such a range to"
        " --service-cluster-ip-range"
    )
    assert reasons(state) == {"[2001:db8::6]:80/TCP": f"Disabled: {why}"}
    # Neither taken nor refused: whoever has them goes on to have them.
    assert {key.ip for key in state.host.steering} == {"80.11.12.10"}
    both = desired(service(cluster_ips=("10.96.0.10", "fd00::10"), **given), endpoints=False)
    assert {key.ip for key in both.host.steering} == {"80.11.12.10", "2001:db8::5", "2001:db8::6"}


def test_nothing_to_proxy_for_external_name_and_headless() -> None:
    for one in (
        service(type=ServiceType.EXTERNAL_NAME, cluster_ip="", external_name="db.example.com"),
        service(cluster_ip="None"),
    ):
        state = desired(one)
        assert (keys(state), state.unopened, state.host.vips) == (set(), (), frozenset())


def test_without_endpoints_the_vip_stays_and_the_listener_is_closed() -> None:
    state = desired(service(), endpoints=False)
    assert keys(state) == set()
    assert reasons(state) == {"10.96.0.10:80/TCP": "NoEndpoints"}
    assert state.host.vips == {"10.96.0.10"}


def test_the_service_created_first_keeps_an_address_then_the_first_by_name() -> None:
    older = service("zeta", created="2026-01-01T00:00:00Z")
    younger = service("alpha", created="2026-02-01T00:00:00Z")
    state = desired(younger, older)
    assert state.host.listeners[ListenerKey("10.96.0.10", 80, Protocol.TCP)].service_port.name == "zeta"
    assert reasons(state) == {"10.96.0.10:80/TCP": "Conflict: 10.96.0.10:80/TCP is held by default/zeta"}
    assert [status.holder for status in state.unopened] == [
        state.host.listeners[ListenerKey("10.96.0.10", 80, Protocol.TCP)].service_port
    ]
    same = desired(service("b", created="2026-01-01T00:00:00Z"), service("a", created="2026-01-01T00:00:00Z"))
    assert next(iter(same.host.listeners.values())).service_port.name == "a"
    # One that is not dated comes after all that are.
    dated = desired(service("a"), service("z", created="2026-01-01T00:00:00Z"))
    assert next(iter(dated.host.listeners.values())).service_port.name == "z"


def test_the_holder_keeps_an_address_while_it_has_no_endpoints() -> None:
    first = service("a", created="2026-01-01T00:00:00Z", ports=(ServicePort(port=80, name="x"),))
    second = service("b", created="2026-02-01T00:00:00Z")
    slices = {
        ObjectName("default", "b"): (
            EndpointSlice(
                metadata=ObjectMeta(name="s"),
                endpoints=(SliceEndpoint(addresses=("10.0.0.1",)),),
                ports=(EndpointPort(port=1),),
            ),
        )
    }
    snapshot = Snapshot(services={one.metadata.key: one for one in (first, second)}, slices=slices)
    state = desired_state(snapshot, NODE, Options())
    assert keys(state) == set()
    assert sorted(str(s) for s in state.unopened) == [
        "Conflict: 10.96.0.10:80/TCP is held by default/a:x",
        "NoEndpoints",
    ]


def test_who_holds_an_address_keeps_it_whatever_the_times_say() -> None:
    key = ListenerKey("10.96.0.10", 80, Protocol.TCP)
    held = {key: ServicePortName("default", "web", "", Protocol.TCP)}
    web, older = (
        service("web", created="2026-02-01T00:00:00Z"),
        service("alpha", created="2026-01-01T00:00:00Z"),
    )
    for endpoints in (True, False):
        state = desired(web, older, held=held, endpoints=endpoints)
        assert {status.holder.name for status in state.unopened if status.holder} == {"web"}
        assert {str(spec.service_port) for spec in state.host.listeners.values()} == (
            {"default/web"} if endpoints else set()
        )
    # Not once it wants the address no more.
    moved = service("web", created="2026-02-01T00:00:00Z", cluster_ip="10.96.0.11")
    state = desired(moved, older, held=held)
    assert {str(key): str(spec.service_port) for key, spec in state.host.listeners.items()} == {
        "10.96.0.10:80/TCP": "default/alpha",
        "10.96.0.11:80/TCP": "default/web",
    }
    # Nor where it never was there.
    assert desired(older, held=held).unopened == ()


IN_USE = Occupied(
    addresses=(("10.96.0.10", "a next hop of this node, at eth0"), ("fd96::1", "a neighbour's, at eth0")),
    networks=(("10.97.0.0/24", "eth1"), ("fd97::/64", "eth1")),
)


def test_a_vip_that_is_in_use_is_refused_with_the_reason() -> None:
    node = msgspec.structs.replace(NODE, occupied=IN_USE)
    for ip, why in (
        ("10.96.0.10", "is a next hop of this node, at eth0"),
        ("fd96::1", "is a neighbour's, at eth0"),
        ("10.97.0.255", "is in 10.97.0.0/24, a network of this node at eth1"),
        ("fd97::5", "is in fd97::/64, a network of this node at eth1"),
    ):
        state = desired(service(cluster_ip=ip), node=node)
        (told,) = reasons(state).values()
        assert told == f"Conflict: {ip} {why}; give the Service another clusterIP"
        assert state.host.vips == frozenset()
        # Where VIPs are bound or mapped they may be the node's own.
        for mode in (VipMode(), VipMode(loopback=True)):
            state = desired(service(cluster_ip=ip), node=node, options=Options(vip_mode=mode))
            assert "Conflict" not in str(reasons(state))
    assert desired(service(cluster_ip="10.97.1.0"), node=node).host.vips == {"10.97.1.0"}
    # Other addresses of a Service are no VIPs.
    state = desired(service(external_ips=("10.97.0.9",)), node=node)
    assert "10.97.0.9:80/TCP" in keys(state)


def test_what_of_the_service_range_is_in_use() -> None:
    assert list(overlaps(("10.96.0.0/16", "fd96::/112"), IN_USE)) == [
        "10.96.0.0/16 has 10.96.0.10 in it, which is a next hop of this node, at eth0",
        "fd96::/112 has fd96::1 in it, which is a neighbour's, at eth0",
    ]
    assert list(overlaps(("10.0.0.0/8",), IN_USE)) == [
        "10.0.0.0/8 overlaps 10.97.0.0/24, a network of this node at eth1",
        "10.0.0.0/8 has 10.96.0.10 in it, which is a next hop of this node, at eth0",
    ]
    assert list(overlaps(("10.97.0.128/25",), IN_USE)) == [
        "10.97.0.128/25 overlaps 10.97.0.0/24, a network of this node at eth1"
    ]
    assert not list(overlaps(("192.168.0.0/16",), IN_USE))


def test_one_service_that_names_an_address_twice_is_no_conflict() -> None:
    ingress = (LoadBalancerIngress(ip="80.11.12.10"),)
    state = desired(
        service(
            type=ServiceType.LOAD_BALANCER,
            external_ips=("80.11.12.10",),
            status=ServiceStatus(load_balancer=LoadBalancerStatus(ingress=ingress)),
        )
    )
    assert keys(state) == {"10.96.0.10:80/TCP", "80.11.12.10:80/TCP"}
    assert state.unopened == ()


def test_a_protocol_behind_a_gate_is_disabled_and_names_the_gate() -> None:
    ports = (ServicePort(port=3868, name="sig", protocol=Protocol.SCTP), ServicePort(port=80, name="http"))
    state = desired(service(ports=ports))
    assert keys(state) == {"10.96.0.10:80/TCP"}
    assert reasons(state) == {"10.96.0.10:3868/SCTP": "Disabled: SCTPSupport"}


def test_loopback_mode_maps_foreign_addresses_and_says_so() -> None:
    state = desired(
        service(cluster_ips=("10.96.0.10", "fd00::1"), external_ips=("80.11.12.10",)),
        options=Options(vip_mode=VipMode(loopback=True)),
    )
    assert {str(k): s.mapped_from for k, s in state.host.listeners.items()} == {
        "127.96.0.10:80/TCP": "10.96.0.10",
        "127.11.12.10:80/TCP": "80.11.12.10",
    }
    assert "fd00::1" in reasons(state)["[fd00::1]:80/TCP"]
    assert state.host.vips == frozenset()
    assert state.host.steering == {}


def test_vips_in_the_loopback_range_need_no_route() -> None:
    assert desired(service(cluster_ip="127.96.0.10")).host.vips == frozenset()


def test_vip_mode_none_serves_node_ports_only() -> None:
    one = service(type=ServiceType.NODE_PORT, ports=(ServicePort(port=80, node_port=30036),))
    state = desired(one, options=Options(vip_mode=VipMode(serve=False), nodeport_addresses=("primary",)))
    assert keys(state) == {"192.0.2.1:30036/TCP"}
    assert reasons(state) == {"10.96.0.10:80/TCP": "Disabled: --vip-mode=none"}


def test_affinity_reaches_the_balancer() -> None:
    state = desired(service(session_affinity=SessionAffinity.CLIENT_IP))
    assert [balancer.affinity_seconds for balancer in state.host.balancers.values()] == [10800]
