"""Snapshot -> DesiredState -> Plan, over random snapshots."""

from __future__ import annotations

import itertools
import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    TrafficPolicy,
)
from proxyd.state.desired import NOBODY, Planner, desired_state
from proxyd.state.plan import Plan, plan
from proxyd.state.snapshot import NodeAddress, NodeView, Options, Snapshot, VipMode
from proxyd.state.spec import HostState, ListenerState, Steering

# Small pools, so that addresses collide often.
VIPS = ["10.96.0.1", "10.96.0.2", "127.96.0.3", "fd00::1"]
FOREIGN = ["80.11.12.10", "192.0.2.7", "10.0.0.1"]
NODE = NodeView(
    name="n1",
    addresses=(
        NodeAddress(ip="127.0.0.1", interface="lo"),
        NodeAddress(ip="10.0.0.1", interface="eth0", primary=True),
        NodeAddress(ip="fd00:1::1", interface="eth0"),
    ),
)

maybe = st.one_of(st.none(), st.booleans())
conditions = st.builds(EndpointConditions, ready=maybe, serving=maybe, terminating=maybe)
slice_endpoints = st.builds(
    SliceEndpoint,
    addresses=st.integers(1, 6).map(lambda n: (f"10.244.0.{n}",)),
    conditions=conditions,
    node_name=st.sampled_from(["n1", "n2", ""]),
)
slice_ports = st.builds(
    EndpointPort,
    name=st.sampled_from(["a", "b"]),
    protocol=st.sampled_from(list(Protocol)),
    port=st.sampled_from([8080, 8081]),
)


@st.composite
def services(draw: st.DrawFn, name: str) -> Service:
    ports = draw(
        st.lists(
            st.builds(
                ServicePort,
                port=st.sampled_from([80, 443]),
                name=st.sampled_from(["a", "b"]),
                protocol=st.sampled_from([Protocol.TCP, Protocol.TCP, Protocol.SCTP]),
                node_port=st.sampled_from([0, 30080, 30443]),
            ),
            min_size=1,
            max_size=2,
            unique_by=lambda port: port.name,
        )
    )
    return Service(
        metadata=ObjectMeta(
            name=name,
            creation_timestamp=draw(st.sampled_from(["", "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"])),
        ),
        spec=ServiceSpec(
            type=draw(st.sampled_from(list(ServiceType))),
            cluster_ips=tuple(draw(st.lists(st.sampled_from(VIPS), max_size=2, unique=True))),
            external_ips=tuple(draw(st.lists(st.sampled_from(FOREIGN), max_size=2, unique=True))),
            ports=tuple(ports),
            session_affinity=draw(st.sampled_from(list(SessionAffinity))),
            internal_traffic_policy=draw(st.sampled_from(list(TrafficPolicy))),
            external_traffic_policy=draw(st.sampled_from(list(TrafficPolicy))),
        ),
        status=ServiceStatus(
            load_balancer=LoadBalancerStatus(
                ingress=tuple(
                    draw(
                        st.lists(
                            st.sampled_from(FOREIGN).map(lambda ip: LoadBalancerIngress(ip=ip)), max_size=1
                        )
                    )
                )
            )
        ),
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    names = draw(st.lists(st.sampled_from(["s1", "s2", "s3", "s4"]), unique=True))
    found = {ObjectName("default", name): draw(services(name)) for name in names}
    slices = {
        key: tuple(
            draw(
                st.lists(
                    st.builds(
                        EndpointSlice,
                        metadata=st.just(ObjectMeta(name=key.name)),
                        endpoints=st.lists(slice_endpoints, max_size=4).map(tuple),
                        ports=st.lists(slice_ports, max_size=3).map(tuple),
                    ),
                    max_size=3,
                )
            )
        )
        for key in found
    }
    return Snapshot(services=found, slices=slices)


options = st.builds(
    Options,
    vip_mode=st.sampled_from([VipMode(route=True), VipMode(), VipMode(loopback=True), VipMode(serve=False)]),
    nodeport_addresses=st.sampled_from([(), ("primary",), ("127.0.0.0/8",)]),
)


@given(snapshots(), options, st.randoms(use_true_random=False))
def test_the_order_of_objects_does_not_matter(snapshot: Snapshot, opts: Options, rng: random.Random) -> None:
    services_shuffled = list(snapshot.services.items())
    rng.shuffle(services_shuffled)
    slices_shuffled = {key: tuple(rng.sample(value, len(value))) for key, value in snapshot.slices.items()}
    shuffled = Snapshot(services=dict(services_shuffled), slices=slices_shuffled)
    assert desired_state(shuffled, NODE, opts) == desired_state(snapshot, NODE, opts)


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.lists(snapshots(), min_size=1, max_size=4), options)
def test_a_planner_that_remembers_answers_like_one_that_does_not(seen: list[Snapshot], opts: Options) -> None:
    planner = Planner()
    for snapshot in seen:
        assert planner.desired(snapshot, NODE, opts) == desired_state(snapshot, NODE, opts)
    follower, held = Planner(), NOBODY
    for snapshot in seen:
        before = dict(held)
        assert follower.desired(snapshot, NODE, opts, held) == desired_state(snapshot, NODE, opts, before)
        held = follower.holders


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.lists(snapshots(), min_size=2, max_size=4), options)
def test_a_service_port_that_stays_keeps_what_it_holds(seen: list[Snapshot], opts: Options) -> None:
    planner = Planner()
    for before, after in itertools.pairwise(seen):
        # Those of before stay, others come or go.
        merged = Snapshot(
            services={**after.services, **before.services}, slices={**after.slices, **before.slices}
        )
        planner.desired(before, NODE, opts, planner.holders)
        held = dict(planner.holders)
        planner.desired(merged, NODE, opts, planner.holders)
        assert {key: planner.holders[key] for key in held} == held


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(
    snapshots(),
    st.lists(snapshots(), min_size=1, max_size=2),
    st.lists(
        st.tuples(st.sampled_from(["s1", "s2", "s3", "s4"]), st.booleans(), st.integers(0, 1)), max_size=6
    ),
    options,
)
def test_one_change_after_another_leads_to_what_all_at_once_does(
    snapshot: Snapshot, others: list[Snapshot], steps: list[tuple[str, bool, int]], opts: Options
) -> None:
    planner = Planner()
    before = planner.desired(snapshot, NODE, opts)
    for name, only_slices, number in steps:
        other = others[number % len(others)]
        # All other objects stay the very same.
        key = ObjectName("default", name)
        new_services, new_slices = dict(snapshot.services), dict(snapshot.slices)
        for mine, theirs in ((new_slices, other.slices), (new_services, other.services)):
            if only_slices and theirs is other.services:
                continue
            mine.pop(key, None)
            if key in theirs:
                mine[key] = theirs[key]
        snapshot = Snapshot(services=new_services, slices=new_slices)
        held = dict(planner.holders)
        have = planner.desired(snapshot, NODE, opts, planner.holders)
        anew = desired_state(snapshot, NODE, opts, held)
        assert have == anew
        assert not plan(have.host, anew.host)
        # What it remembers of its changes leaves nothing out.
        assert applied(before.host, plan(before.host, have.host)) == have.host
        before = have


def applied(state: HostState, todo: Plan) -> HostState:
    """The host state after a plan was carried out in full."""
    listeners = {key: spec for key, spec in state.listeners.items() if key not in todo.close}
    listeners |= {spec.key: spec for spec in (*todo.open, *todo.change)}
    balancers = {key: spec for key, spec in state.balancers.items() if key not in todo.drop_balancers}
    balancers |= {spec.key: spec for spec in todo.set_balancers}
    steering = {key: how for key, how in state.steering.items() if key not in todo.unsteer} | todo.steer
    return HostState(
        balancers=balancers,
        listeners=listeners,
        vips=(state.vips | todo.add_vips) - todo.remove_vips,
        steering=steering,
    )


@given(snapshots(), options)
def test_no_plan_for_what_is_already_so(snapshot: Snapshot, opts: Options) -> None:
    state = desired_state(snapshot, NODE, opts).host
    again = desired_state(snapshot, NODE, opts).host
    assert not plan(state, again)


@settings(max_examples=200)
@given(snapshots(), snapshots(), options, options)
def test_applying_a_plan_reaches_the_desired_state(
    a: Snapshot, b: Snapshot, before: Options, after: Options
) -> None:
    have = desired_state(a, NODE, before).host
    want = desired_state(b, NODE, after).host
    assert applied(have, plan(have, want)) == want


@given(snapshots(), options)
def test_every_open_listener_has_endpoints_and_every_wish_a_status(snapshot: Snapshot, opts: Options) -> None:
    desired = desired_state(snapshot, NODE, opts)
    for key, listener in desired.host.listeners.items():
        assert listener.key == key
        assert desired.host.balancers[listener.balancer].endpoints
        assert key.protocol in opts.protocols
    holders = {key: {listener.service_port} for key, listener in desired.host.listeners.items()}
    for status in desired.unopened:
        if status.state is ListenerState.NO_ENDPOINTS:
            holders.setdefault(status.key, set()).add(status.service_port)
    # An address is held once: no listener that is open is also refused, but as the loser's conflict.
    for status in desired.unopened:
        if status.state is not ListenerState.CONFLICT:
            assert status.key not in desired.host.listeners or (
                desired.host.listeners[status.key].service_port != status.service_port
            )
        else:
            assert "is held by" in status.detail
            assert status.holder in holders[status.key] - {status.service_port}


@given(snapshots(), options)
def test_steered_addresses_are_never_the_nodes_own_and_follow_the_listener(
    snapshot: Snapshot, opts: Options
) -> None:
    host = desired_state(snapshot, NODE, opts).host
    own = {address.ip for address in NODE.addresses}
    for key, how in host.steering.items():
        assert key.ip not in own
        assert (how is Steering.LOCAL) == (key in host.listeners)
    assert host.vips.isdisjoint(own)
