"""Annotations for SCTP: what they say, what is said of wrong ones, and how they reach the slices of a Service."""

from __future__ import annotations

import re

import pytest

from proxyd.api.discovery import EndpointAddress, EndpointPort, Endpoints, EndpointSubset
from proxyd.api.findings import Findings
from proxyd.api.meta import ObjectMeta
from proxyd.api.pod import Pod, PodIP, PodStatus
from proxyd.api.rules import Rules
from proxyd.api.sctp import parse_addresses, parse_endpoint_addresses, written
from proxyd.api.service import Protocol, Service, ServicePort, ServiceSpec
from proxyd.api.validate_backends import check_endpoints, check_pod
from proxyd.api.validate_service import check_service
from proxyd.sources.standalone.endpoints import PodIndex, slices_from_endpoints, slices_from_pods

ADDRESSES = "proxyd.io/sctp-addresses"
OF_ENDPOINTS = "proxyd.io/sctp-endpoint-addresses"


def test_addresses() -> None:
    assert parse_addresses("10.2.0.7") == ("10.2.0.7",)
    assert parse_addresses(" 10.2.0.7,FD00::0:7 , 10.2.0.7") == ("10.2.0.7", "fd00::7")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", 'expected IP addresses separated by commas, got ""'),
        ("10.2.0.7,", 'expected IP addresses separated by commas, got ""'),
        ("10.2.0.7:3868", 'expected IP addresses separated by commas, got "10.2.0.7:3868"'),
        ("0.0.0.0", '"0.0.0.0" is no address of a host'),
        ("224.0.0.9", '"224.0.0.9" is no address of a host'),
        (",".join(f"10.2.0.{i}" for i in range(16)), "at most 15 further addresses, got 16"),
    ],
)
def test_wrong_addresses(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(why)}$"):
        parse_addresses(text)


def test_addresses_of_endpoints() -> None:
    said = parse_endpoint_addresses("10.1.0.7=10.2.0.7,10.3.0.7; 10.1.0.8=10.2.0.8;")
    assert said == {"10.1.0.7": ("10.2.0.7", "10.3.0.7"), "10.1.0.8": ("10.2.0.8",)}
    assert parse_endpoint_addresses(written(said)) == said


@pytest.mark.parametrize("text", ["10.1.0.7", "10.1.0.7=", "=10.2.0.7", "a=10.2.0.7", "10.1.0.7=b"])
def test_wrong_addresses_of_endpoints(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_endpoint_addresses(text)


def test_wrong_annotations_are_warnings() -> None:
    wrong = ObjectMeta(name="x", annotations={ADDRESSES: "nowhere", OF_ENDPOINTS: "10.1.0.7"})
    spec = ServiceSpec(cluster_ip="10.96.0.10", ports=(ServicePort(port=1),))
    subset = EndpointSubset(addresses=(EndpointAddress(ip="10.1.0.7"),))
    for check, thing in (
        (check_service, Service(metadata=wrong, spec=spec)),
        (check_endpoints, Endpoints(metadata=wrong, subsets=(subset,))),
        (check_pod, Pod(metadata=wrong)),
    ):
        found = Findings()
        check(thing, Rules(), found)  # type: ignore[operator]  # each with its own
        assert [(one.severity, one.path[2], one.message) for one in found.found] == [
            ("warning", ADDRESSES, 'has no effect: expected IP addresses separated by commas, got "nowhere"'),
            ("warning", OF_ENDPOINTS, 'has no effect: expected ADDRESS=FURTHER,...; ..., got "10.1.0.7"'),
        ]


def service() -> Service:
    ports = (ServicePort(port=3868, protocol=Protocol.SCTP),)
    return Service(metadata=ObjectMeta(name="hss"), spec=ServiceSpec(selector={"app": "hss"}, ports=ports))


def pod(name: str, *ips: str, **annotations: str) -> Pod:
    return Pod(
        metadata=ObjectMeta(name=name, labels={"app": "hss"}, annotations=annotations),
        status=PodStatus(pod_ip=ips[0], pod_ips=tuple(PodIP(ip=ip) for ip in ips)),
    )


def test_pods_bring_their_further_addresses() -> None:
    pods = [
        pod("a", "10.1.0.7", "fd00:1::7", **{ADDRESSES: "10.2.0.7,10.3.0.7"}),
        pod("b", "10.1.0.8"),
        pod("c", "10.1.0.9", **{ADDRESSES: "oops"}),
    ]
    selected = slices_from_pods(service(), PodIndex({one.metadata.key: one for one in pods}))
    assert len(selected.slices) == 2
    for one in selected.slices:
        assert parse_endpoint_addresses(one.metadata.annotations[OF_ENDPOINTS]) == {
            "10.1.0.7": ("10.2.0.7", "10.3.0.7"),
            "fd00:1::7": ("10.2.0.7", "10.3.0.7"),
        }


def test_endpoints_pass_theirs_on() -> None:
    meta = ObjectMeta(name="hss", annotations={OF_ENDPOINTS: "10.1.0.7=10.2.0.7", "other": "x"})
    subset = EndpointSubset(
        addresses=(EndpointAddress(ip="10.1.0.7"),), ports=(EndpointPort(port=3868, protocol=Protocol.SCTP),)
    )
    (one,) = slices_from_endpoints(service(), Endpoints(metadata=meta, subsets=(subset,)))
    assert one.metadata.annotations == {OF_ENDPOINTS: "10.1.0.7=10.2.0.7"}
