"""Allocations beside a cluster: nothing that one of its Services has is handed out."""

from __future__ import annotations

from proxyd.api.meta import ObjectMeta, ObjectName
from proxyd.api.service import Service, ServicePort, ServiceSpec, ServiceType
from proxyd.sources.standalone.allocation import Allocations, Settings, Taken, allocate

WEB = ObjectName("prod", "web")
NOW = "2026-01-02T03:04:05.000006Z"
SETTINGS = Settings(cluster_cidrs=("10.96.0.0/30",), node_port_range=(30000, 30001))
WANTED = {
    WEB: Service(
        metadata=ObjectMeta(namespace="prod", name="web"),
        spec=ServiceSpec(type=ServiceType.NODE_PORT, ports=(ServicePort(port=80),)),
    )
}


def given(taken: Taken, before: Allocations | None = None) -> tuple[str, int, Allocations, list[str]]:
    """What web gets: clusterIP and nodePort; the allocations; the shortages' messages."""
    done = allocate(WANTED, before or Allocations(), SETTINGS, NOW, taken=taken)
    spec = done.services[WEB].spec
    return spec.cluster_ip, spec.ports[0].node_port, done.allocations, [s.message for s in done.shortages]


def taken(*what: str | int) -> Taken:
    return Taken(
        addresses=frozenset(one for one in what if isinstance(one, str)),
        node_ports=frozenset(one for one in what if isinstance(one, int)),
    )


def test_what_is_left_is_handed_out() -> None:
    for ip, other in (("10.96.0.1", "10.96.0.2"), ("10.96.0.2", "10.96.0.1")):
        for port, free in ((30000, 30001), (30001, 30000)):
            assert given(taken(ip, port))[:2] == (other, free)


def test_an_allocation_that_the_cluster_comes_to_use_moves_and_stays_there() -> None:
    ip, port, before, problems = given(taken())
    assert not problems
    moved_ip, moved_port, after, problems = given(taken(ip, port), before)
    assert not problems
    assert {ip, moved_ip} == {"10.96.0.1", "10.96.0.2"}
    assert {port, moved_port} == {30000, 30001}
    assert given(taken(), after)[:2] == (moved_ip, moved_port)


def test_nothing_left_is_said() -> None:
    ip, port, _, problems = given(taken("10.96.0.1", "10.96.0.2", 30000, 30001))
    assert (ip, port) == ("", 0)
    assert len(problems) == 2
    assert all("is left in --service-" in text for text in problems)
