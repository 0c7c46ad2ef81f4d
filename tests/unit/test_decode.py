"""Which documents are objects, what becomes of each, and their canonical form."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from proxyd.api.decode import Decoded, Rules, decode
from proxyd.api.discovery import Endpoints, EndpointSlice
from proxyd.api.meta import ObjectName
from proxyd.api.pod import Pod, PodPhase
from proxyd.api.service import Protocol, Service, ServiceType, SessionAffinity

RULES = Rules()


def service(name: str = "web", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "prod"},
        "spec": {"ports": [{"port": 80}]} | spec,
    }


def lines(decoded: Decoded) -> list[str]:
    return [str(problem) for problem in decoded.problems]


def only(raw: object) -> Any:
    decoded = decode(raw, RULES)
    assert lines(decoded) == []
    (thing,) = decoded.objects
    return thing


NO_OBJECTS: list[tuple[object, str]] = [
    (None, "error: expected an object (a map with apiVersion and kind), got null"),
    ([], "error: expected an object (a map with apiVersion and kind), got a list"),
    ("hello\nworld", 'error: expected an object (a map with apiVersion and kind), got "hello\\nworld"'),
    ({"kind": "Service"}, 'error: Service: apiVersion: required, as in "apiVersion: v1, kind: Service"'),
    (
        {"kind": "Service", "apiVersion": None, "metadata": {"name": "a"}},
        'error: Service default/a: apiVersion: required, as in "apiVersion: v1, kind: Service"',
    ),
    ({"apiVersion": "v1"}, 'error: kind: required, as in "apiVersion: v1, kind: Service"'),
    ({"apiVersion": "v1", "kind": ["Service"]}, "error: kind: expected a string, got a list"),
    ({"apiVersion": 1, "kind": "Service"}, "error: Service: apiVersion: expected a string, got 1"),
    ({"apiVersion": "v1", "kind": "service"}, 'error: service: kind: expected Service, got "service"'),
    ({"apiVersion": "v2", "kind": "List", "items": []}, 'error: List: apiVersion: expected v1, got "v2"'),
    ({"apiVersion": "v1", "kind": "List", "items": {}}, "error: List: items: expected a list, got a map"),
    (
        {"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1", "kind": "List"}]},
        "error: kind: a list inside a list is not read: write its items here",
    ),
    ({"apiVersion": "v1", "kind": "Service", "metadata": {}}, "error: Service: metadata.name: required"),
    ({"apiVersion": "v1", "kind": "Pod"}, "error: Pod: metadata: required"),
]


@pytest.mark.parametrize(("raw", "line"), NO_OBJECTS)
def test_what_cannot_be_known_as_an_object(raw: object, line: str) -> None:
    decoded = decode(raw, RULES)
    assert line in lines(decoded)
    assert (decoded.objects, decoded.rejected) == ((), ())
    assert not decoded.complete


@pytest.mark.parametrize(
    ("kind", "version", "expected"),
    [
        ("Service", "v2", "v1"),
        ("Service", "apps/v1", "v1"),
        ("Pod", "v1beta3", "v1"),
        ("EndpointSlice", "v1", "discovery.k8s.io/v1 or discovery.k8s.io/v1beta1"),
        ("EndpointSlice", "discovery.k8s.io/v1alpha1", "discovery.k8s.io/v1 or discovery.k8s.io/v1beta1"),
    ],
)
def test_unknown_versions_of_our_kinds_name_the_accepted_ones(kind: str, version: str, expected: str) -> None:
    decoded = decode({"apiVersion": version, "kind": kind, "metadata": {"name": "a"}}, RULES)
    assert lines(decoded) == [f'error: {kind} default/a: apiVersion: expected {expected}, got "{version}"']
    assert decoded.rejected == ((kind, ObjectName("default", "a")),)
    assert decoded.complete


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (
            {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "prod"}},
            "warning: Deployment prod/web: kind Deployment (apps/v1) is not used by proxyd: ignored",
        ),
        (
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "prod"}},
            "warning: Namespace prod: kind Namespace (v1) is not used by proxyd: ignored",
        ),
        (
            {"apiVersion": "v1", "kind": "ConfigMapList", "items": []},
            "warning: ConfigMapList: kind ConfigMapList (v1) is not used by proxyd: ignored",
        ),
        (
            {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": {"name": "fn"}},
            "warning: Service default/fn: kind Service (serving.knative.dev/v1) is not used by proxyd: ignored",
        ),
    ],
)
def test_other_kinds_are_ignored_with_one_warning(raw: object, line: str) -> None:
    decoded = decode(raw, RULES)
    assert lines(decoded) == [line]
    assert (decoded.objects, decoded.rejected, decoded.complete) == ((), (), True)


def test_defaults_of_a_service() -> None:
    raw = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "a"},
        "spec": {"ports": [{"port": 80}]},
    }
    thing = only(raw)
    assert isinstance(thing, Service)
    assert thing.metadata.key == ObjectName("default", "a")
    assert thing.spec.type is ServiceType.CLUSTER_IP
    assert thing.spec.session_affinity is SessionAffinity.NONE
    assert (thing.spec.ports[0].protocol, thing.spec.ports[0].target) == (Protocol.TCP, 80)


def test_nulls_and_empty_enums_are_missing() -> None:
    raw = service(
        type="",
        clusterIP=None,
        sessionAffinity=None,
        selector={"app": None},
        ports=[{"port": 1, "protocol": None}],
    )
    raw["metadata"] |= {"namespace": None, "labels": None, "creationTimestamp": None}
    raw["status"] = None
    thing = only(raw)
    assert thing == only(raw | {"metadata": {"name": "web", "namespace": ""}})
    assert thing.metadata.namespace == "default"
    assert thing.spec.type is ServiceType.CLUSTER_IP
    # A selector with an empty value is not the same as none: it matches Pods whose label is empty.
    assert thing.spec.selector == {"app": ""}


def test_addresses_of_a_service_are_canonical() -> None:
    raw = service(
        type="LoadBalancer",
        clusterIP="FD00:0:0::1",
        clusterIPs=["fd00::0001", "::ffff:10.0.0.1"],
        externalIPs=["2001:DB8::0:1", "2001:db8::1"],
        loadBalancerSourceRanges=[" 10.1.2.3/8 ", "FD00::/8"],
    )
    raw["status"] = {"loadBalancer": {"ingress": [{"ip": "2001:DB8::2"}, {"hostname": "lb"}]}}
    thing = only(raw)
    assert thing.spec.cluster_ip == "fd00::1"
    assert thing.spec.cluster_ips == ("fd00::1", "10.0.0.1")
    assert thing.spec.external_ips == ("2001:db8::1",)
    assert thing.spec.load_balancer_source_ranges == ("10.0.0.0/8", "fd00::/8")
    assert [entry.ip for entry in thing.status.load_balancer.ingress] == ["2001:db8::2", ""]


def test_addresses_of_backends_are_canonical() -> None:
    endpoints = only(
        {
            "apiVersion": "v1",
            "kind": "Endpoints",
            "metadata": {"name": "a"},
            "subsets": [
                {"addresses": [{"ip": "2001:DB8::1"}], "notReadyAddresses": [{"ip": "::ffff:1.2.3.4"}]}
            ],
        }
    )
    assert isinstance(endpoints, Endpoints)
    assert endpoints.subsets[0].addresses[0].ip == "2001:db8::1"
    assert endpoints.subsets[0].not_ready_addresses[0].ip == "1.2.3.4"
    status = {"podIP": "2001:DB8::1", "podIPs": [{"ip": "2001:DB8:0::1"}], "phase": "Running"}
    pod = only({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "status": status})
    assert isinstance(pod, Pod)
    assert (pod.status.pod_ip, pod.status.pod_ips[0].ip) == ("2001:db8::1", "2001:db8::1")
    assert pod.status.phase is PodPhase.RUNNING


def a_slice(version: str, **endpoint: Any) -> EndpointSlice:
    raw = {
        "apiVersion": f"discovery.k8s.io/{version}",
        "kind": "EndpointSlice",
        "metadata": {"name": "a-1", "labels": {"kubernetes.io/service-name": "a"}},
        "addressType": "IPv6",
        "endpoints": [{"addresses": ["2001:DB8::1"]} | endpoint],
    }
    thing = only(raw)
    assert isinstance(thing, EndpointSlice)
    return thing


def test_a_v1beta1_slice_equals_the_v1_slice_that_says_the_same() -> None:
    topology = {"kubernetes.io/hostname": "node-1", "topology.kubernetes.io/zone": "z", "other": "x"}
    beta = a_slice("v1beta1", topology=topology)
    assert beta == a_slice("v1", nodeName="node-1", zone="z")
    assert beta.endpoints[0].addresses == ("2001:db8::1",)
    assert beta.service == ObjectName("default", "a")


def test_topology_means_nothing_in_v1() -> None:
    assert a_slice("v1", topology={"kubernetes.io/hostname": "node-1"}) == a_slice("v1")


def test_items_of_a_list_are_good_or_bad_by_themselves() -> None:
    decoded = decode(
        {
            "apiVersion": "v1",
            "kind": "List",
            "items": [
                service("good"),
                service("bad", ports=[{"port": "eighty"}]),
                {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}},
                7,
                service("also-good"),
            ],
        },
        RULES,
    )
    assert [str(thing.metadata.key) for thing in decoded.objects] == ["prod/good", "prod/also-good"]
    assert decoded.object_places == (("items", 0), ("items", 4))
    assert lines(decoded) == [
        'error: Service prod/bad: spec.ports[0].port: expected an integer, got "eighty"',
        "warning: Secret s: kind Secret (v1) is not used by proxyd: ignored",
        "error: expected an object (a map with apiVersion and kind), got 7",
    ]
    assert decoded.problem_places == (
        ("items", 1, "spec", "ports", 0, "port"),
        ("items", 2, "kind"),
        ("items", 3),
    )
    assert decoded.rejected == (("Service", ObjectName("prod", "bad")),)
    assert decoded.rejected_places == (("items", 1),)
    assert not decoded.complete


def test_items_of_a_typed_list_need_not_say_their_kind() -> None:
    item = service()
    del item["kind"], item["apiVersion"]
    slices = {
        "apiVersion": "discovery.k8s.io/v1beta1",
        "kind": "EndpointSliceList",
        "items": [
            {
                "metadata": {"name": "a"},
                "endpoints": [{"addresses": ["10.0.0.1"], "topology": {"kubernetes.io/hostname": "n"}}],
            }
        ],
    }
    assert decode({"apiVersion": "v1", "kind": "ServiceList", "items": [item]}, RULES).objects == (
        only(service()),
    )
    assert only(slices).endpoints[0].node_name == "n"
    (line,) = lines(
        decode({"apiVersion": "v1", "kind": "List", "items": [item | {"kind": "Service"}]}, RULES)
    )
    assert line == 'error: Service prod/web: apiVersion: required, as in "apiVersion: v1, kind: Service"'


@pytest.mark.parametrize("items", [{}, {"items": None}, {"items": []}])
def test_an_empty_list_is_fine(items: dict[str, Any]) -> None:
    decoded = decode({"apiVersion": "v1", "kind": "List"} | items, RULES)
    assert (decoded.objects, decoded.problems, decoded.complete) == ((), (), True)


def test_long_and_unprintable_values_are_shown_short_and_on_one_line() -> None:
    decoded = decode(service("w\n" + "x" * 500, type="\x1b[31m" + "y" * 500), RULES)
    (line,) = lines(decoded)
    assert "\n" not in line
    assert "\x1b" not in line
    assert len(line) < 300


def test_numbers_too_large_for_any_field_are_refused() -> None:
    decoded = decode(service(ports=[{"port": 10**5000}, {"port": 10**30}]), RULES)
    assert len(lines(decoded)) > 1
    assert decoded.objects == ()


def test_objects_encode_as_kubernetes_writes_them() -> None:
    built = msgspec.to_builtins(only(service(externalIPs=["80.11.12.10"])))
    assert built["spec"]["externalIPs"] == ("80.11.12.10",)
    assert decode(built | {"apiVersion": "v1", "kind": "Service"}, RULES).objects == (
        only(service(externalIPs=["80.11.12.10"])),
    )
