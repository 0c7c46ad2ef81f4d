"""The standalone controllers: endpoints from Pods and Endpoints, allocations, and the snapshot they make."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from types import FrameType
from typing import Any

import msgspec
import pytest

from proxyd.api.discovery import Endpoints, EndpointSlice
from proxyd.api.meta import ObjectName
from proxyd.api.pod import Pod
from proxyd.api.service import Service
from proxyd.sources.manifests.source import ManifestSet
from proxyd.sources.standalone.allocation import (
    Allocated,
    Allocation,
    Allocations,
    Settings,
    Taken,
    allocate,
    taken_around,
)
from proxyd.sources.standalone.assemble import Assembled, assemble
from proxyd.state.occupied import Occupied

NOW = "2026-01-02T03:04:05.000006Z"
LATER = "2027-01-02T03:04:05.000006Z"
SETTINGS = Settings(cluster_cidrs=("10.96.0.0/24",), node_port_range=(30000, 30009))
DUAL = Settings(cluster_cidrs=("10.96.0.0/24", "fd00:96::/112"), node_port_range=(30000, 30009))


def meta(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "namespace": "prod", **more}


def service(name: str = "web", *, created: str = "", **spec: Any) -> Service:
    spec.setdefault("ports", [{"port": 80}])
    return msgspec.convert({"metadata": meta(name, creationTimestamp=created), "spec": spec}, Service)


def pod(name: str, ip: str = "10.244.0.1", labels: dict[str, str] | None = None, **parts: Any) -> Pod:
    status = {"podIP": ip, **parts.pop("status", {})}
    more = {key: parts.pop(key) for key in ("deletionTimestamp", "namespace") if key in parts}
    return msgspec.convert(
        {"metadata": meta(name, labels=labels or {"app": "web"}, **more), "status": status, **parts}, Pod
    )


def endpoints(name: str, *subsets: dict[str, Any], **more: Any) -> Endpoints:
    return msgspec.convert({"metadata": meta(name, **more), "subsets": list(subsets)}, Endpoints)


def named(items: list[Any]) -> dict[ObjectName, Any]:
    return {item.metadata.key: item for item in items}


def manifests(*objects: Any, **more: Any) -> ManifestSet:
    kinds: dict[type, list[Any]] = {Service: [], Endpoints: [], EndpointSlice: [], Pod: []}
    for item in objects:
        kinds[type(item)].append(item)
    return ManifestSet(
        services=named(kinds[Service]),
        endpoints=named(kinds[Endpoints]),
        slices=named(kinds[EndpointSlice]),
        pods=named(kinds[Pod]),
        origins={(type(item).__name__, item.metadata.key): f"{item.metadata.name}.yaml" for item in objects},
        **more,
    )


def run(
    *objects: Any, settings: Settings = SETTINGS, previous: Allocations | None = None, **more: Any
) -> Assembled:
    return assemble(manifests(*objects, **more), previous or Allocations(), settings, NOW)


def flat(result: Assembled, name: str = "web") -> set[tuple[str, str, int | None, bool | None]]:
    """(port name, address, number, ready) of every endpoint of a Service."""
    return {
        (port.name, endpoint.addresses[0], port.port, endpoint.conditions.ready)
        for item in result.snapshot.slices.get(ObjectName("prod", name), ())
        for endpoint in item.endpoints
        for port in item.ports
    }


def messages(result: Assembled) -> list[str]:
    return [str(problem) for problem in result.problems]


class TestPods:
    web = service(selector={"app": "web"}, ports=[{"name": "http", "port": 80, "targetPort": 9376}])

    def test_every_selector_pair_must_match_in_the_same_namespace(self) -> None:
        wants = service(selector={"app": "web", "tier": "front"})
        result = run(
            wants,
            pod("both", "10.244.0.1", {"app": "web", "tier": "front", "x": "y"}),
            pod("one", "10.244.0.2", {"app": "web"}),
            pod("other-value", "10.244.0.3", {"app": "web", "tier": "back"}),
            pod("elsewhere", "10.244.0.4", {"app": "web", "tier": "front"}, namespace="dev"),
        )
        assert flat(result) == {("", "10.244.0.1", 80, True)}

    def test_an_empty_selector_selects_nothing(self) -> None:
        result = run(service(), pod("a"))
        assert flat(result) == set()

    def test_slices_look_like_the_controllers(self) -> None:
        result = run(self.web, pod("a", spec={"nodeName": "n1"}))
        (item,) = result.snapshot.slices[ObjectName("prod", "web")]
        assert item.address_type == "IPv4"
        assert item.service == ObjectName("prod", "web")
        assert item.metadata.labels["kubernetes.io/service-name"] == "web"
        assert item.metadata.name.startswith("web-")
        (endpoint,) = item.endpoints
        assert endpoint.node_name == "n1"
        assert endpoint.target_ref is not None
        assert (endpoint.target_ref.kind, endpoint.target_ref.name) == ("Pod", "a")
        assert [(port.name, port.protocol, port.port) for port in item.ports] == [("http", "TCP", 9376)]

    def test_each_family_has_its_slice(self) -> None:
        both = pod("a", status={"podIPs": [{"ip": "10.244.0.1"}, {"ip": "fd00::1"}]})
        old = pod("b", "fd00::2")
        slices = run(self.web, both, old).snapshot.slices[ObjectName("prod", "web")]
        assert {item.address_type: {e.addresses[0] for e in item.endpoints} for item in slices} == {
            "IPv4": {"10.244.0.1"},
            "IPv6": {"fd00::1", "fd00::2"},
        }

    def test_named_target_ports_are_looked_up_in_each_pod_by_name_and_protocol(self) -> None:
        wants = service(
            selector={"app": "web"},
            ports=[
                {"name": "http", "port": 80, "targetPort": "web"},
                {"name": "admin", "port": 81, "targetPort": "admin"},
            ],
        )

        def containers(*ports: tuple[str, int, str]) -> dict[str, Any]:
            declared = [
                {"name": name, "containerPort": number, "protocol": proto} for name, number, proto in ports
            ]
            return {"containers": [{"ports": []}, {"ports": declared}]}

        result = run(
            wants,
            pod("a", "10.244.0.1", spec=containers(("web", 8080, "TCP"), ("admin", 9000, "TCP"))),
            pod("b", "10.244.0.2", spec=containers(("web", 8081, "TCP"), ("admin", 9000, "UDP"))),
            pod("c", "10.244.0.3", spec=containers()),
        )
        assert flat(result) == {
            ("http", "10.244.0.1", 8080, True),
            ("admin", "10.244.0.1", 9000, True),
            ("http", "10.244.0.2", 8081, True),
        }
        assert any("no container port named admin/TCP" in line for line in messages(result))

    @pytest.mark.parametrize(
        ("status", "more", "ready"),
        [
            ({}, {}, True),
            ({"phase": "Running"}, {}, True),
            ({"phase": "Pending"}, {}, False),
            ({"phase": "Unknown"}, {}, False),
            ({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}, {}, True),
            ({"phase": "Running", "conditions": [{"type": "Ready", "status": "False"}]}, {}, False),
            ({"phase": "Running", "conditions": [{"type": "Initialized", "status": "True"}]}, {}, False),
            ({"phase": "Running"}, {"deletionTimestamp": NOW}, False),
        ],
    )
    def test_readiness(self, status: dict[str, Any], more: dict[str, Any], ready: bool) -> None:
        assert flat(run(self.web, pod("a", status=status, **more))) == {("http", "10.244.0.1", 9376, ready)}
        publishing = msgspec.structs.replace(
            self.web, spec=msgspec.structs.replace(self.web.spec, publish_not_ready_addresses=True)
        )
        assert flat(run(publishing, pod("a", status=status, **more))) == {("http", "10.244.0.1", 9376, True)}

    @pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
    def test_pods_that_ended_never_count(self, phase: str) -> None:
        publishing = service(selector={"app": "web"}, publishNotReadyAddresses=True)
        conditions = [{"type": "Ready", "status": "True"}]
        assert flat(run(publishing, pod("a", status={"phase": phase, "conditions": conditions}))) == set()

    @pytest.mark.parametrize("serving", [True, False])
    def test_a_pod_being_deleted_is_terminating_and_serves_as_long_as_it_is_ready(
        self, serving: bool
    ) -> None:
        conditions = [{"type": "Ready", "status": "True" if serving else "False"}]
        result = run(self.web, pod("a", status={"conditions": conditions}, deletionTimestamp=NOW))
        (item,) = result.snapshot.slices[ObjectName("prod", "web")]
        found = item.endpoints[0].conditions
        assert (found.ready, found.serving, found.terminating) == (False, serving, True)

    def test_a_pod_without_an_address_is_left_out_and_said_once(self) -> None:
        result = run(self.web, service("other", selector={"app": "web"}), pod("a"), pod("b", ""))
        assert flat(result) == {("http", "10.244.0.1", 9376, True)}
        assert messages(result) == ["b.yaml: warning: Pod prod/b: has no status.podIP: left out"]

    def test_many_pods_make_slices_of_at_most_1000(self) -> None:
        pods = [pod(f"p{n}", f"10.244.{n // 250}.{n % 250}") for n in range(1001)]
        slices = run(self.web, *pods).snapshot.slices[ObjectName("prod", "web")]
        assert sorted(len(item.endpoints) for item in slices) == [1, 1000]
        assert len({item.metadata.name for item in slices}) == 2


class TestWrittenByHand:
    db = service("db", ports=[{"name": "sql", "port": 5432}])

    def test_endpoints_become_slices_ready_and_not_per_family(self) -> None:
        written = endpoints(
            "db",
            {
                "addresses": [{"ip": "1.2.3.4", "nodeName": "n1"}, {"ip": "fd00::9"}],
                "notReadyAddresses": [{"ip": "1.2.3.5"}],
                "ports": [{"name": "sql", "port": 5432}],
            },
            {"addresses": [{"ip": "1.2.3.6"}], "ports": [{"name": "sql", "port": 5433}]},
        )
        result = run(self.db, written)
        assert flat(result, "db") == {
            ("sql", "1.2.3.4", 5432, True),
            ("sql", "fd00::9", 5432, True),
            ("sql", "1.2.3.5", 5432, False),
            ("sql", "1.2.3.6", 5433, True),
        }
        assert all(
            (":" in endpoint.addresses[0]) == (item.address_type == "IPv6")
            for item in result.snapshot.slices[ObjectName("prod", "db")]
            for endpoint in item.endpoints
        )

    def test_port_names_are_kept_even_where_each_side_has_one(self) -> None:
        written = endpoints(
            "db", {"addresses": [{"ip": "1.2.3.4"}], "ports": [{"name": "other", "port": 5432}]}
        )
        assert flat(run(self.db, written), "db") == {("other", "1.2.3.4", 5432, True)}

    def test_skip_mirror_is_honoured(self) -> None:
        written = endpoints(
            "db",
            {"addresses": [{"ip": "1.2.3.4"}], "ports": [{"name": "sql", "port": 5432}]},
            labels={"endpointslice.kubernetes.io/skip-mirror": "true"},
        )
        assert flat(run(self.db, written), "db") == set()

    def test_slices_belong_by_label_or_by_name_and_merge_with_all_others(self) -> None:
        def piece(name: str, ip: str, **more: Any) -> EndpointSlice:
            document = {
                "metadata": meta(name, **more),
                "endpoints": [{"addresses": [ip]}],
                "ports": [{"name": "sql", "port": 5432}],
            }
            return msgspec.convert(document, EndpointSlice)

        selecting = service("db", selector={"app": "web"}, ports=[{"name": "sql", "port": 5432}])
        result = run(
            selecting,
            piece("db-x1", "1.1.1.1", labels={"kubernetes.io/service-name": "db"}),
            piece("db", "1.1.1.2"),
            endpoints("db", {"addresses": [{"ip": "1.1.1.3"}], "ports": [{"name": "sql", "port": 5432}]}),
            pod("a", "1.1.1.4"),
        )
        assert {entry[1] for entry in flat(result, "db")} == {"1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4"}

    def test_what_has_no_service_is_said(self) -> None:
        result = run(endpoints("gone", {"addresses": [{"ip": "1.2.3.4"}], "ports": [{"port": 1}]}))
        assert messages(result) == [
            "gone.yaml: warning: Endpoints prod/gone: there is no Service prod/gone: not used"
        ]
        assert result.snapshot.slices == {}

    def test_a_rejected_service_is_not_said_to_be_missing(self) -> None:
        written = endpoints("bad", {"addresses": [{"ip": "1.2.3.4"}], "ports": [{"port": 1}]})
        assert messages(run(written, rejected=frozenset({ObjectName("prod", "bad")}))) == []


class TestWarnings:
    def test_no_endpoints(self) -> None:
        assert messages(run(service())) == [
            "web.yaml: warning: Service prod/web: no endpoints: connections will be refused"
        ]

    def test_no_pod_matches(self) -> None:
        assert messages(run(service(selector={"app": "x"}), pod("a"))) == [
            "web.yaml: warning: Service prod/web: no Pod matches its selector: connections will be refused"
        ]

    def test_none_ready(self) -> None:
        assert messages(run(service(selector={"app": "web"}), pod("a", status={"phase": "Pending"}))) == [
            "web.yaml: warning: Service prod/web: no ready endpoints: connections will be refused"
        ]

    def test_headless_and_external_name_are_not_warned_about(self) -> None:
        assert (
            messages(
                run(service("a", clusterIP="None"), service("b", type="ExternalName", externalName="x.y"))
            )
            == []
        )

    def test_external_name_has_no_slices(self) -> None:
        result = run(service(type="ExternalName", externalName="x.y", selector={"app": "web"}), pod("a"))
        assert result.snapshot.slices == {}
        assert ObjectName("prod", "web") in result.snapshot.services


def allocated(
    *services: Service, previous: Allocations | None = None, settings: Settings = SETTINGS
) -> Allocated:
    return allocate(named(list(services)), previous or Allocations(), settings, NOW)


def ips(result: Allocated, name: str = "web") -> tuple[str, ...]:
    return result.services[ObjectName("prod", name)].spec.all_cluster_ips


def node_ports(result: Allocated, name: str = "web") -> list[int]:
    return [port.node_port for port in result.services[ObjectName("prod", name)].spec.ports]


class TestClusterIPs:
    def test_one_is_given_in_range_and_filled_in_everywhere(self) -> None:
        result = allocated(service())
        spec = result.services[ObjectName("prod", "web")].spec
        assert ip_address(spec.cluster_ip) in ip_network("10.96.0.0/24")
        assert spec.cluster_ips == (spec.cluster_ip,)
        assert spec.ip_families == ("IPv4",)
        assert spec.cluster_ip not in {"10.96.0.0", "10.96.0.255"}

    def test_it_is_mostly_the_same_without_state(self) -> None:
        assert ips(allocated(service())) == ips(allocated(service("a"), service(), service("z")))

    def test_none_for_headless_external_name_and_given(self) -> None:
        result = allocated(
            service("headless", clusterIP="None"),
            service("alias", type="ExternalName", externalName="x.y"),
            service("given", clusterIP="192.168.7.7", created=NOW),
        )
        assert ips(result, "headless") == ()
        assert ips(result, "alias") == ()
        assert ips(result, "given") == ("192.168.7.7",)
        assert ObjectName("prod", "given") not in result.allocations.services

    def test_an_allocated_one_moves_when_a_manifest_gives_it(self) -> None:
        first = allocated(service())
        (mine,) = ips(first)
        second = allocated(service(), service("new", clusterIP=mine), previous=first.allocations)
        assert ips(second, "new") == (mine,)
        assert ips(second) != (mine,)
        third = allocated(service(), service("new", clusterIP=mine), previous=second.allocations)
        assert ips(third) == ips(second)

    def test_a_newcomer_never_displaces_an_allocated_one(self) -> None:
        narrow = Settings(cluster_cidrs=("10.96.0.0/29",))
        first = allocated(service("m"), settings=narrow)
        others = [service(f"a{n}", created="2000-01-01T00:00:00Z") for n in range(5)]
        second = allocated(service("m"), *others, previous=first.allocations, settings=narrow)
        assert ips(second, "m") == ips(first, "m")
        assert second.shortages == ()

    def test_exhausted_is_said_of_the_service_and_nothing_else_stops(self) -> None:
        narrow = Settings(cluster_cidrs=("10.96.0.0/30",))
        result = allocated(service("a"), service("b"), service("c"), settings=narrow)
        assert {ips(result, "a"), ips(result, "b")} == {("10.96.0.1",), ("10.96.0.2",)}
        assert ips(result, "c") == ()
        (shortage,) = result.shortages
        assert shortage.service == ObjectName("prod", "c")
        assert shortage.path == "spec.clusterIP"
        whole = run(service("a"), service("b"), service("c"), settings=narrow)
        assert [text for text in messages(whole) if ": error: " in text] == [
            f"c.yaml: error: Service prod/c: spec.clusterIP: {shortage.message}"
        ]

    @pytest.mark.parametrize(
        ("spec", "families"),
        [
            ({}, (4,)),
            ({"ipFamilies": ["IPv6"]}, (6,)),
            ({"ipFamilyPolicy": "PreferDualStack"}, (4, 6)),
            ({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6", "IPv4"]}, (6, 4)),
            ({"ipFamilyPolicy": "RequireDualStack", "clusterIP": "10.0.0.1"}, (4, 6)),
            ({"ipFamilyPolicy": "SingleStack", "clusterIP": "10.0.0.1"}, (4,)),
        ],
    )
    def test_families(self, spec: dict[str, Any], families: tuple[int, ...]) -> None:
        result = allocated(service(**spec), settings=DUAL)
        assert tuple(ip_address(ip).version for ip in ips(result)) == families
        assert result.shortages == ()

    @pytest.mark.parametrize(("policy", "count"), [("PreferDualStack", 0), ("RequireDualStack", 1)])
    def test_a_family_without_a_range(self, policy: str, count: int) -> None:
        result = allocated(service(ipFamilyPolicy=policy, ipFamilies=["IPv4", "IPv6"]))
        assert len(ips(result)) == 1
        assert len(result.shortages) == count

    def test_another_range_means_another_address(self) -> None:
        first = allocated(service())
        second = allocated(
            service(), previous=first.allocations, settings=Settings(cluster_cidrs=("10.97.0.0/24",))
        )
        assert ip_address(ips(second)[0]) in ip_network("10.97.0.0/24")


class TestNodePorts:
    def test_only_where_they_are_wanted(self) -> None:
        result = allocated(
            service("cluster"),
            service("node", type="NodePort"),
            service("lb", type="LoadBalancer"),
            service("lb-without", type="LoadBalancer", allocateLoadBalancerNodePorts=False),
            service("given", type="NodePort", ports=[{"port": 80, "nodePort": 30003}]),
        )
        assert node_ports(result, "cluster") == [0]
        assert node_ports(result, "lb-without") == [0]
        assert node_ports(result, "given") == [30003]
        chosen = node_ports(result, "node") + node_ports(result, "lb")
        assert len(set(chosen)) == 2
        assert all(30000 <= number <= 30009 and number != 30003 for number in chosen)

    def test_the_same_port_on_two_protocols_shares_one_number(self) -> None:
        ports = [
            {"name": "dns", "port": 53, "protocol": "UDP"},
            {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
            {"name": "metrics", "port": 9153},
        ]
        first, second, third = node_ports(allocated(service(type="NodePort", ports=ports)))
        assert first == second != third
        ports[1]["nodePort"] = 30005
        assert node_ports(allocated(service(type="NodePort", ports=ports)))[:2] == [30005, 30005]

    def test_an_allocated_one_moves_when_a_manifest_gives_it(self) -> None:
        first = allocated(service(type="NodePort"))
        (mine,) = node_ports(first)
        claim = service("new", type="NodePort", ports=[{"port": 1, "nodePort": mine, "protocol": "UDP"}])
        second = allocated(service(type="NodePort"), claim, previous=first.allocations)
        assert node_ports(second, "new") == [mine]
        assert node_ports(second) != [mine]

    def test_exhausted_is_said_and_nothing_else_stops(self) -> None:
        settings = Settings(node_port_range=(30000, 30001))
        result = allocated(*(service(f"s{n}", type="NodePort") for n in range(3)), settings=settings)
        assert sorted(node_ports(result, f"s{n}")[0] for n in range(3)) == [0, 30000, 30001]
        (shortage,) = result.shortages
        assert shortage.path == "spec.ports[0].nodePort"
        assert all(ips(result, f"s{n}") for n in range(3))

    def test_they_are_released_with_the_type(self) -> None:
        first = allocated(service(type="NodePort"))
        second = allocated(service(), previous=first.allocations)
        assert second.allocations.services[ObjectName("prod", "web")].node_ports == {}
        assert ips(second) == ips(first)


class TestInUse:
    """What is in use around the node is not handed out."""

    def test_addresses_and_networks(self) -> None:
        around = Occupied(
            addresses=(("10.96.0.200", "a next hop"), ("192.0.2.1", "an address")),
            networks=(("10.96.0.0/25", "eth0"), ("10.96.0.192/29", "eth1"), ("192.0.2.0/24", "eth0")),
        )
        taken = taken_around(around, SETTINGS.cluster_cidrs)
        assert taken == Taken(
            addresses=frozenset({"10.96.0.200"}), networks=frozenset({"10.96.0.0/25", "10.96.0.192/29"})
        )
        free = 127 - 1 - 8  # the upper half without the broadcast address, the next hop and a network
        services = named([service(f"s{n}") for n in range(free + 5)])
        result = allocate(services, Allocations(), SETTINGS, NOW, taken=taken)
        given = {ip for each in services.values() for ip in ips(result, each.metadata.name)}
        assert len(given) == free
        for ip in given:
            assert ip_address(ip) in ip_network("10.96.0.128/25")
            assert ip_address(ip) not in ip_network("10.96.0.192/29")
            assert ip != "10.96.0.200"
        assert len(result.shortages) == 5
        assert (
            "networks of this node (10.96.0.0/25, 10.96.0.192/29) overlap it" in result.shortages[0].message
        )

    def test_what_comes_into_use_moves_and_the_rest_stays(self) -> None:
        services = named([service(f"s{n}") for n in range(60)])
        first = allocate(services, Allocations(), SETTINGS, NOW)
        taken = Taken(networks=frozenset({"10.96.0.0/25"}))
        second = allocate(services, first.allocations, SETTINGS, NOW, taken=taken)
        for name in services:
            (before,), (after,) = ips(first, name.name), ips(second, name.name)
            assert (before == after) == (ip_address(before) not in ip_network("10.96.0.0/25"))
            assert ip_address(after) not in ip_network("10.96.0.0/25")

    def test_a_large_range_that_is_in_use_costs_nothing(self) -> None:
        wide = Settings(cluster_cidrs=("10.0.0.0/8",))
        taken = Taken(networks=frozenset({"10.0.0.0/9", "10.128.0.0/10"}))
        services = named([service(f"s{n}") for n in range(1000)])
        began = time.process_time()
        result = allocate(services, Allocations(), wide, NOW, taken=taken)
        assert time.process_time() - began < 2
        assert all(ip_address(*ips(result, name.name)) in ip_network("10.192.0.0/10") for name in services)


class TestMemory:
    def test_creation_time_is_that_of_the_first_sight(self) -> None:
        first = allocated(service())
        assert first.services[ObjectName("prod", "web")].metadata.creation_timestamp == NOW
        again = allocate(named([service(), service("z")]), first.allocations, SETTINGS, LATER)
        assert again.services[ObjectName("prod", "web")].metadata.creation_timestamp == NOW
        assert again.services[ObjectName("prod", "z")].metadata.creation_timestamp == LATER

    def test_who_comes_later_is_younger_though_the_clock_has_gone_back(self) -> None:
        """Also than one of the same moment, where names would decide."""
        for then in (NOW, LATER):
            first = allocate(named([service("zeta")]), Allocations(), SETTINGS, then)
            second = allocate(named([service("zeta"), service("beta")]), first.allocations, SETTINGS, NOW)
            third = allocate(
                named([service("zeta"), service("beta"), service("alpha")]), second.allocations, SETTINGS, NOW
            )
            times = {name.name: one.metadata.creation_timestamp for name, one in third.services.items()}
            assert times["zeta"] == then
            assert times["zeta"] < times["beta"] < times["alpha"]
            assert third.allocations.services[ObjectName("prod", "alpha")].created == times["alpha"]

    def test_a_creation_time_that_is_none_hinders_nobody(self) -> None:
        for odd in ("zzz", "9999-12-31T23:59:59.999999Z"):
            previous = Allocations(services={ObjectName("prod", "a"): Allocation(created=odd)})
            result = allocate(named([service("a"), service("b")]), previous, SETTINGS, NOW)
            assert result.services[ObjectName("prod", "b")].metadata.creation_timestamp == odd

    def test_a_given_creation_time_is_kept(self) -> None:
        result = allocated(service(created="2020-01-01T00:00:00Z"))
        assert (
            result.services[ObjectName("prod", "web")].metadata.creation_timestamp == "2020-01-01T00:00:00Z"
        )
        assert result.allocations.services[ObjectName("prod", "web")].created == ""

    def test_a_service_that_is_gone_is_forgotten(self) -> None:
        first = run(service(), service("other"))
        second = run(service("other"), previous=first.allocations)
        assert list(second.allocations.services) == [ObjectName("prod", "other")]

    @pytest.mark.parametrize(
        "more", [{"rejected": frozenset({ObjectName("prod", "web")})}, {"complete": False}]
    )
    def test_a_service_that_may_come_back_keeps_what_it_had(self, more: dict[str, Any]) -> None:
        first = run(service(type="NodePort"))
        between = run(service("other"), previous=first.allocations, **more)
        last = run(service(type="NodePort"), service("other"), previous=between.allocations)
        before, after = (result.snapshot.services[ObjectName("prod", "web")] for result in (first, last))
        assert before == after

    def test_what_a_manifest_claims_meanwhile_is_not_kept_for_the_absent(self) -> None:
        first = run(service())
        mine = first.snapshot.services[ObjectName("prod", "web")].spec.cluster_ip
        between = run(service("new", clusterIP=mine), previous=first.allocations, complete=False)
        assert between.allocations.services[ObjectName("prod", "web")].cluster_ips == ()


def many(count: int) -> ManifestSet:
    """So many Services, each with three Pods of its own."""
    objects: list[Any] = []
    for n in range(count):
        objects.append(
            service(
                f"s{n}",
                selector={"app": f"a{n}", "tier": "web"},
                type="NodePort" if n % 5 < 2 else "ClusterIP",
            )
        )
        objects += [
            pod(f"p{n}-{i}", f"10.{n // 250}.{n % 250}.{i + 1}", {"app": f"a{n}", "tier": "web"})
            for i in range(3)
        ]
    return manifests(*objects)


def calls(work: Callable[[], object]) -> int:
    """How many functions are called in this."""
    count = 0

    def called(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(called)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_the_work_grows_as_the_services_do_and_not_faster() -> None:
    settings = Settings(cluster_cidrs=("10.96.0.0/16",))
    few, all_of_them = many(500), many(5000)
    result = assemble(all_of_them, Allocations(), settings, NOW)
    assert len(result.snapshot.slices) == 5000
    assert result.problems == ()
    for_few, for_all = (
        calls(lambda given=given: assemble(given, Allocations(), settings, NOW))
        for given in (few, all_of_them)
    )
    assert for_all < 12 * for_few, (for_few, for_all)
    assert for_all < 5000 * 400, for_all
