"""What is said of a daemon, as values and as tables."""

from __future__ import annotations

import msgspec
import pytest

from proxyd.api.service import ServicePort
from proxyd.cli.get import resource_table
from proxyd.cli.status import status_text
from proxyd.cli.tables import Status, table
from proxyd.control.admin import views
from proxyd.control.admin.schema import Counters, ServiceView
from proxyd.state.snapshot import Snapshot
from proxyd.state.spec import ListenerState
from tests.support.pictures import LATE, READY, TCP, WEB, key, listener, picture, service, slice_of


def test_the_services_table_reads_as_promised():
    assert resource_table("services", views.services(picture())).splitlines() == [
        "NAMESPACE  NAME  TYPE          CLUSTER-IP  EXTERNAL-IP              PORT(S)        ENDPOINTS  CONNS  STATUS",
        "prod       db    ClusterIP     None        <none>                   <none>         1/1        0      Headless",
        "prod       dns   ClusterIP     10.0.0.53   <none>                   53/UDP,53/TCP  0/2        0      NoEndpoints",
        "prod       ext   ExternalName  <none>      my.database.example.com  <none>         -          -      Alias",
        "prod       sig   ClusterIP     10.0.0.77   <none>                   3868/SCTP      2/2        0      Disabled: SCTPSupport",
        "prod       web   NodePort      10.0.0.10   <none>                   80:30080/TCP   3/3        1128   Serving",
        "test       late  ClusterIP     10.0.0.10   192.0.2.1                80/TCP         0/0        0      Conflict: 10.0.0.10:80/TCP is held by prod/web",
    ]


def test_services_of_one_namespace_or_name():
    assert [s.name for s in views.services(picture(), namespace="test")] == ["late"]
    assert [s.namespace for s in views.services(picture(), name="web")] == ["prod"]
    assert not views.services(picture(), namespace="test", name="web")


@pytest.mark.parametrize(
    ("states", "worst"),
    [
        ("SERVING NO_ENDPOINTS", "NoEndpoints"),
        ("NO_ENDPOINTS DISABLED SERVING", "Disabled"),
        ("DISABLED CONFLICT", "Conflict"),
        ("CONFLICT FAILED SERVING", "Failed"),
        ("SERVING SERVING", "Serving"),
    ],
)
def test_the_worst_listener_speaks_for_its_service(states, worst):
    statuses = tuple(
        listener(f"10.0.0.{n}:80", WEB, ListenerState[state]) for n, state in enumerate(states.split(), 1)
    )
    (view,) = views.services(picture(statuses=statuses), name="web")
    assert view.state == worst
    assert sum(view.listeners.values()) == len(statuses)


def test_a_service_that_nothing_serves_says_so():
    (view,) = views.services(picture(statuses=()), name="web")
    assert view.status == "NotServed"


def test_dual_stack_endpoints_are_counted_once():
    both = service("a/b", cluster_ips=("fd00::1", "10.0.0.1"), ports=(ServicePort(port=80),))
    four = slice_of("a/b", [("", 80, TCP)], ("10.1.0.1", READY), ("10.1.0.2", READY))
    six = msgspec.structs.replace(slice_of("a/b", [("", 80, TCP)], ("fd00::9", READY)), address_type="IPv6")
    snapshot = Snapshot(services={key("a/b"): both}, slices={key("a/b"): (four, six)})
    (view,) = views.services(picture(snapshot=snapshot))
    assert (view.endpoints_ready, view.endpoints_total) == (1, 1)
    assert [e.address for e in views.endpoints(picture(snapshot=snapshot))] == [
        "10.1.0.1:80",
        "10.1.0.2:80",
        "[fd00::9]:80",
    ]


def test_a_service_survives_the_way_to_the_client():
    items = views.services(picture())
    assert msgspec.json.decode(msgspec.json.encode(items), type=list[ServiceView]) == items
    first = msgspec.json.decode(msgspec.json.encode(items[-1]))
    assert first["clusterIps"] == ["10.0.0.10"]
    assert first["detail"] == "10.0.0.10:80/TCP is held by prod/web"


def test_endpoints_in_order_with_their_conditions_and_counters():
    lines = resource_table("endpoints", views.endpoints(picture(), namespace="prod"), wide=True).splitlines()
    assert lines[0].split() == [
        "NAMESPACE",
        "NAME",
        "PORT",
        "ENDPOINT",
        "READY",
        "SERVING",
        "TERMINATING",
        "CONNS",
        "TOTAL",
        "FAILED",
        "USED",
        "IN",
        "OUT",
        "NODE",
    ]
    assert [line.split()[:10] for line in lines[1:]] == [
        ["prod", "dns", "udp/UDP", "10.1.0.5:53", "no", "no", "no", "5", "5", "0"],
        ["prod", "dns", "udp/UDP", "10.1.0.6:53", "no", "yes", "yes", "6", "6", "0"],
        ["prod", "dns", "tcp/TCP", "10.1.0.5:53", "no", "no", "no", "5", "5", "0"],
        ["prod", "dns", "tcp/TCP", "10.1.0.6:53", "no", "yes", "yes", "6", "6", "0"],
        ["prod", "sig", "diameter/SCTP", "10.1.0.7:3868", "yes", "yes", "no", "7", "7", "0"],
        ["prod", "sig", "diameter/SCTP", "10.1.0.8:3868", "yes", "yes", "no", "8", "8", "0"],
        ["prod", "web", "TCP", "10.1.0.1:9376", "yes", "yes", "no", "1", "1", "0"],
        ["prod", "web", "TCP", "10.1.0.2:9376", "yes", "yes", "no", "2", "2", "0"],
        ["prod", "web", "TCP", "10.1.0.3:9376", "yes", "yes", "no", "3", "3", "0"],
    ]
    assert [line.split()[10] for line in lines[1:]] == ["no"] * 6 + ["yes"] * 3


def test_listeners_in_order_of_address():
    lines = resource_table("listeners", views.listeners(picture())).splitlines()
    assert lines[0].split() == ["ADDRESS", "PORT", "PROTOCOL", "ROLE", "SERVICE", "STATUS"]
    assert [" ".join(line.split()) for line in lines[1:3]] == [
        "10.0.0.10 80 TCP ClusterIP prod/web Serving",
        "10.0.0.10 80 TCP ClusterIP test/late Conflict: 10.0.0.10:80/TCP is held by prod/web",
    ]
    assert [line.split()[0] for line in lines[1:]] == sorted(
        (line.split()[0] for line in lines[1:]), key=lambda ip: [int(n) for n in ip.split(".")]
    )


def test_a_mapped_address_says_what_it_stands_for():
    mapped = (listener("127.96.0.10:80", WEB, ListenerState.SERVING, mapped_from="10.96.0.10"),)
    heading, line = resource_table("listeners", views.listeners(picture(statuses=mapped))).splitlines()
    assert "FOR" in heading.split()
    assert line.split() == ["127.96.0.10", "80", "TCP", "ClusterIP", "10.96.0.10", "prod/web", "Serving"]


def test_status_text():
    first = views.status(picture(), now=1_000_000.0 + 273_600)
    second = views.status(
        picture(counters=lambda n: Counters(opened=1204, bytes_in=47_000_000 * (n == WEB), bytes_out=0)),
        now=1_000_000.0 + 273_600,
    )
    assert status_text(first, second, 0.5, now=1_000_002.0).splitlines() == [
        "proxyd 0.1.0  serving  up 3d4h  pid 812  workers 2",
        "  source   manifests config  synced, last event 2s ago",
        "  state    6 services  7 listeners (1 conflict, 1 disabled, 3 without endpoints)  3 endpoints",
        "  traffic  6,020 connections  84 MB/s in  0 B/s out",
        "  workers  1 restart since the start",
        "  conflict test/late 10.0.0.10:80/TCP: 10.0.0.10:80/TCP is held by prod/web",
        "  problem  config/web.yaml:14: error: Service prod/bad: no ports",
    ]


def test_status_of_many_failures_is_bounded():
    many = tuple(listener(f"10.0.{n}.1:80", LATE, ListenerState.FAILED, "x") for n in range(200))
    view = views.status(picture(statuses=many), now=0)
    text = status_text(view, view, 1, now=0)
    assert len(text.splitlines()) < 20
    assert "and 190 more: proxyd get listeners" in text


def test_only_the_status_is_coloured_by_its_state_also_where_it_is_cut():
    rows = [
        ["Failed", Status("Failed", "Failed: x")],
        ["b", Status("Conflict", "Conflict: held by prod/other")],
        ["c", Status("Serving", "Serving")],
        ["d", Status("Alias", "Failed")],
    ]
    assert "\033" not in table(["NAME", "STATUS"], rows)
    assert table(["NAME", "STATUS"], rows, colour=True, width=20).splitlines() == [
        "NAME    STATUS",
        "Failed  \033[31mFailed: x\033[0m",
        "b       \033[31mConflict: h…\033[0m",
        "c       \033[32mServing\033[0m",
        "d       Failed",
    ]


def test_what_a_manifest_says_does_not_steer_the_terminal():
    text = table(["A"], [["\033[2Jx\ny"]])
    assert text.splitlines() == ["A", "\\x1b[2Jx\\x0ay"]


def test_columns_align_with_wide_characters():
    lines = table(["NAME", "B"], [["日本", "x"], ["abcd", "y"]]).splitlines()
    assert lines == ["NAME  B", "日本  x", "abcd  y"]
