"""Which endpoints of a service port take traffic."""

from __future__ import annotations

import pytest

from proxyd.api.discovery import (
    EndpointConditions,
    EndpointHints,
    EndpointPort,
    EndpointSlice,
    ForNode,
    ForZone,
    SliceEndpoint,
)
from proxyd.api.meta import ObjectMeta
from proxyd.api.service import Protocol, ServicePort, TrafficPolicy
from proxyd.state.endpoints import candidates, select
from proxyd.state.spec import Endpoint

PORT = ServicePort(port=80, name="http")
READY = EndpointConditions()
NOT_READY = EndpointConditions(ready=False)
TERMINATING = EndpointConditions(ready=False, serving=True, terminating=True)
STOPPED = EndpointConditions(ready=False, serving=False, terminating=True)


def endpoint(last: int, conditions=READY, *, node="", zones=(), nodes=()) -> SliceEndpoint:
    hints = None
    if zones or nodes:
        hints = EndpointHints(
            for_zones=tuple(ForZone(name=z) for z in zones), for_nodes=tuple(ForNode(name=n) for n in nodes)
        )
    return SliceEndpoint(addresses=(f"10.0.0.{last}",), conditions=conditions, node_name=node, hints=hints)


def one_slice(
    *endpoints: SliceEndpoint, port=8080, name="http", protocol=Protocol.TCP, family="IPv4"
) -> EndpointSlice:
    return EndpointSlice(
        metadata=ObjectMeta(name="s"),
        address_type=family,
        endpoints=endpoints,
        ports=(EndpointPort(name=name, protocol=protocol, port=port),),
    )


def chosen(*slices: EndpointSlice, policy=TrafficPolicy.CLUSTER, node="n1", zone="z1") -> list[str]:
    picked = select(candidates(PORT, slices, 4), policy, node=node, zone=zone)
    return [str(e) for e in picked]


def test_ports_match_by_name_and_protocol_not_by_number() -> None:
    assert chosen(one_slice(endpoint(1), port=9999)) == ["10.0.0.1:9999"]
    assert chosen(one_slice(endpoint(1), name="other")) == []
    assert chosen(one_slice(endpoint(1), protocol=Protocol.UDP)) == []


def test_slices_are_merged_and_an_address_counts_once_in_order_of_address() -> None:
    merged = chosen(
        one_slice(endpoint(10), endpoint(9)),
        one_slice(endpoint(9), endpoint(2)),
        one_slice(endpoint(2), port=81),
    )
    assert merged == ["10.0.0.2:81", "10.0.0.2:8080", "10.0.0.9:8080", "10.0.0.10:8080"]


def test_only_the_first_address_and_only_the_family_count() -> None:
    two = SliceEndpoint(addresses=("10.0.0.1", "10.0.0.2"))
    assert chosen(one_slice(two)) == ["10.0.0.1:8080"]
    assert chosen(one_slice(SliceEndpoint(addresses=("fd00::1",)), family="IPv6")) == []
    assert chosen(one_slice(SliceEndpoint(addresses=("example.com",)), family="FQDN")) == []


@pytest.mark.parametrize("policy", list(TrafficPolicy))
@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([READY, NOT_READY, TERMINATING], ["10.0.0.1:8080"]),
        ([NOT_READY, TERMINATING, TERMINATING], ["10.0.0.2:8080", "10.0.0.3:8080"]),
        ([NOT_READY, STOPPED, TERMINATING], ["10.0.0.3:8080"]),
        ([NOT_READY, STOPPED], []),
        ([EndpointConditions(ready=None, serving=None, terminating=None)], ["10.0.0.1:8080"]),
        ([EndpointConditions(ready=False, serving=None, terminating=True)], []),
    ],
)
def test_ready_ones_or_else_those_that_serve_while_they_terminate(policy, conditions, expected) -> None:
    found = [endpoint(n, c, node="n1") for n, c in enumerate(conditions, start=1)]
    assert chosen(one_slice(*found), policy=policy) == expected


def test_local_policy_takes_this_nodes_endpoints_only_also_in_the_fallback() -> None:
    here_and_there = one_slice(endpoint(1, node="n1"), endpoint(2, node="n2"), endpoint(3))
    assert chosen(here_and_there, policy=TrafficPolicy.LOCAL) == ["10.0.0.1:8080"]
    assert chosen(here_and_there, policy=TrafficPolicy.LOCAL, node="n3") == []
    fallback = one_slice(endpoint(1, TERMINATING, node="n1"), endpoint(2, node="n2"))
    assert chosen(fallback, policy=TrafficPolicy.LOCAL) == ["10.0.0.1:8080"]
    assert chosen(fallback, policy=TrafficPolicy.CLUSTER) == ["10.0.0.2:8080"]


def test_an_endpoint_in_two_slices_is_as_usable_as_the_better_of_them() -> None:
    assert chosen(one_slice(endpoint(1, NOT_READY)), one_slice(endpoint(1))) == ["10.0.0.1:8080"]
    assert chosen(one_slice(endpoint(1)), one_slice(endpoint(1, NOT_READY))) == ["10.0.0.1:8080"]


def test_zone_hints_count_when_every_ready_endpoint_has_them_and_one_matches() -> None:
    both = one_slice(endpoint(1, zones=["z1"]), endpoint(2, zones=["z2"]))
    assert chosen(both) == ["10.0.0.1:8080"]
    assert chosen(both, zone="z3") == ["10.0.0.1:8080", "10.0.0.2:8080"]
    assert chosen(both, zone="") == ["10.0.0.1:8080", "10.0.0.2:8080"]
    partly = one_slice(endpoint(1, zones=["z1"]), endpoint(2))
    assert chosen(partly) == ["10.0.0.1:8080", "10.0.0.2:8080"]


def test_node_hints_come_before_zone_hints() -> None:
    found = one_slice(endpoint(1, nodes=["n2"], zones=["z1"]), endpoint(2, nodes=["n1"], zones=["z2"]))
    assert chosen(found) == ["10.0.0.2:8080"]
    assert chosen(found, node="n9") == ["10.0.0.1:8080"]


def test_a_port_of_a_slice_without_number_is_no_endpoint() -> None:
    assert candidates(PORT, [one_slice(endpoint(1), port=None)], 4) == ()


def test_ipv6_endpoints_read_with_brackets() -> None:
    found = one_slice(SliceEndpoint(addresses=("fd00::1",)), family="IPv6")
    assert select(candidates(PORT, [found], 6), TrafficPolicy.CLUSTER) == (Endpoint("fd00::1", 8080),)
    assert str(Endpoint("fd00::1", 8080)) == "[fd00::1]:8080"
