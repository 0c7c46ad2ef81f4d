"""Metrics as Prometheus reads them, their limits; health as probes read it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxyd.api.discovery import EndpointSlice
from proxyd.api.meta import ObjectMeta
from proxyd.api.service import Protocol, TrafficPolicy
from proxyd.control.feeds.facts import ClusterFacts
from proxyd.control.observe import exposition, health
from proxyd.control.observe.exposition import Chosen
from proxyd.control.observe.health import Health
from proxyd.control.observe.metrics import MAX_TROUBLES, Facts, Metrics, WorkerState
from proxyd.control.workers.publication import Publication
from proxyd.relay.ipc.slots import (
    ATTEMPTS,
    BYTES_IN,
    BYTES_OUT,
    CLOSED,
    CONNECT_US,
    DATAGRAMS_IN,
    DATAGRAMS_OUT,
    DROPPED,
    DROPPED_OVERRUN,
    DROPPED_TO_CLIENT,
    DROPPED_TO_ENDPOINT,
    EVICTED,
    FAILED,
    OPENED,
    REFUSED,
    Slots,
)
from proxyd.sources.text.documents import Document, read_documents
from proxyd.state.snapshot import Snapshot
from proxyd.state.spec import (
    BalancerKey,
    BalancerSpec,
    Endpoint,
    ListenerKey,
    ListenerState,
    ListenerStatus,
    Role,
    ServicePortName,
)
from tests.support.paths import REPOSITORY

DASHBOARDS = REPOSITORY / "config" / "grafana"
RULES = REPOSITORY / "config" / "prometheus"
WEB = ServicePortName("prod", "web", "http", Protocol.TCP)
DNS = ServicePortName("prod", "dns", "dns", Protocol.UDP)
HSS = ServicePortName("prod", "hss", "diameter", Protocol.SCTP)
A, B = Endpoint("10.244.0.1", 8080), Endpoint("fd00::1", 8080)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def publication() -> Iterator[Publication]:
    slots = Slots.create()
    yield Publication(slots, 2)
    slots.close()


def balancer(
    port: ServicePortName = WEB, *endpoints: Endpoint, policy: TrafficPolicy = TrafficPolicy.CLUSTER
) -> BalancerSpec:
    return BalancerSpec(key=BalancerKey(port, policy, 4), endpoints=endpoints or (A, B))


def count(publication: Publication, owner: object, worker: int, **counters: int) -> None:
    """As a worker does."""
    slots = publication._slots
    row = slots.row(worker, publication._rows.take(owner))
    names = {
        "opened": OPENED, "closed": CLOSED, "failed": FAILED, "attempts": ATTEMPTS, "bytes_in": BYTES_IN,
        "bytes_out": BYTES_OUT, "connect_us": CONNECT_US, "refused": REFUSED, "datagrams_in": DATAGRAMS_IN, "datagrams_out": DATAGRAMS_OUT,
        "evicted": EVICTED, "dropped": DROPPED, "to_endpoint": DROPPED_TO_ENDPOINT, "to_client": DROPPED_TO_CLIENT,
        "overrun": DROPPED_OVERRUN,
    }  # fmt: skip
    for name, value in counters.items():
        slots.view[row + names[name]] += value


def samples(text: bytes) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def scrape(facts: Facts, metrics: Metrics | None = None) -> Samples:
    return samples(b"".join((metrics or Metrics()).render(facts)))


def of(got: Samples, name: str, **labels: str) -> float | None:
    return got.get((name, frozenset(labels.items())))


def facts(publication: Publication, *balancers: BalancerSpec, **more: object) -> Facts:
    return Facts(phase="serving", healthy=True, publication=publication, balancers=balancers, **more)


WEB_LABELS = {"namespace": "prod", "service": "web", "port": "http", "protocol": "TCP"}


def test_a_service_port_is_the_sum_of_workers_and_balancers(publication):
    both = balancer(), balancer(WEB, A, policy=TrafficPolicy.LOCAL)
    for one in both:
        publication.set_balancer(one)
    count(publication, both[0].key, 0, opened=5, closed=2, failed=1, attempts=6, bytes_in=100, bytes_out=1)
    count(publication, both[0].key, 1, opened=10, closed=10, bytes_in=1000)
    count(publication, both[1].key, 1, opened=100, closed=99, refused=7)
    got = scrape(facts(publication, *both))
    values = {
        name: of(got, f"proxyd_{name}", **WEB_LABELS)
        for name in (
            "connections_total", "connections_active", "connections_refused_total", "connections_failed_total",
            "dial_attempts_total", "received_bytes_total", "sent_bytes_total",
        )
    }  # fmt: skip
    assert list(values.values()) == [115, 4, 7, 1, 6, 1100, 1]


def test_an_endpoint_is_the_sum_of_the_balancers_that_have_it(publication):
    both = balancer(), balancer(WEB, A, policy=TrafficPolicy.LOCAL)
    for one in both:
        publication.set_balancer(one)
    count(publication, (both[0].key, A), 0, opened=3, closed=1, attempts=4, failed=1, connect_us=1_500_000)
    count(publication, (both[1].key, A), 1, opened=1, closed=1, bytes_in=5, bytes_out=6)
    count(publication, (both[0].key, B), 1, failed=2)
    got = scrape(facts(publication, *both))
    values = [
        of(got, f"proxyd_endpoint_{name}", **WEB_LABELS, endpoint="10.244.0.1:8080")
        for name in (
            "connections_total", "connections_active", "dial_attempts_total", "dial_failures_total",
            "connect_seconds_sum", "connect_seconds_count", "received_bytes_total", "sent_bytes_total",
        )
    ]  # fmt: skip
    assert values == [4, 2, 4, 1, 1.5, 4, 5, 6]
    assert of(got, "proxyd_endpoint_dial_failures_total", **WEB_LABELS, endpoint="[fd00::1]:8080") == 2


def test_datagrams_of_udp_ports(publication):
    both = balancer(), balancer(DNS)
    for one in both:
        publication.set_balancer(one)
    figures = {"datagrams_in": 8, "datagrams_out": 7, "evicted": 6, "dropped": 5, "to_endpoint": 4}
    count(publication, both[1].key, 0, refused=1, failed=2, to_client=3, **figures)
    count(publication, both[1].key, 1, datagrams_in=100, overrun=9)
    got = scrape(facts(publication, *both))
    labels = {"namespace": "prod", "service": "dns", "port": "dns", "protocol": "UDP"}
    assert of(got, "proxyd_received_datagrams_total", **labels) == 108
    assert of(got, "proxyd_sent_datagrams_total", **labels) == 7
    assert of(got, "proxyd_flows_evicted_total", **labels) == 6
    reasons = {
        "refused": 1, "no_endpoint": 2, "to_client": 3, "to_endpoint": 4, "shortage": 5, "overrun": 9,
    }  # fmt: skip
    for reason, value in reasons.items():
        assert of(got, "proxyd_datagrams_dropped_total", reason=reason, **labels) == value
    # A TCP port has none of these.
    assert not [name for name, given in got if "datagrams" in name and ("service", "web") in given]


def test_messages_of_sctp_ports(publication):
    publication.set_balancer(balancer(HSS))
    count(publication, balancer(HSS).key, 0, datagrams_in=8, datagrams_out=7, to_client=3)
    count(publication, balancer(HSS).key, 1, datagrams_in=100, to_endpoint=4)
    got = scrape(facts(publication, balancer(HSS)))
    labels = {"namespace": "prod", "service": "hss", "port": "diameter", "protocol": "SCTP"}
    assert of(got, "proxyd_received_messages_total", **labels) == 108
    assert of(got, "proxyd_sent_messages_total", **labels) == 7
    assert of(got, "proxyd_messages_dropped_total", reason="to_client", **labels) == 3
    assert of(got, "proxyd_messages_dropped_total", reason="to_endpoint", **labels) == 4
    assert not [name for name, _ in got if "datagrams" in name]


def test_endpoints_can_be_left_out(publication):
    publication.set_balancer(balancer())
    got = scrape(facts(publication, balancer(), endpoints=False))
    assert of(got, "proxyd_connections_total", **WEB_LABELS) == 0
    assert not [name for name, _ in got if name.startswith("proxyd_endpoint_")]


def test_a_service_port_without_endpoints_is_there(publication):
    status = ListenerStatus(
        key=ListenerKey("10.96.0.1", 80, Protocol.TCP),
        service_port=WEB,
        role=Role.CLUSTER_IP,
        state=ListenerState.NO_ENDPOINTS,
    )
    got = scrape(facts(publication, unopened=(status,), wanted=3, failed=1))
    assert of(got, "proxyd_connections_refused_total", **WEB_LABELS) == 0
    states = {
        state: of(got, "proxyd_listeners", state=state) for state in ("Serving", "Failed", "NoEndpoints")
    }
    assert states == {"Serving": 2, "Failed": 1, "NoEndpoints": 1}


def test_labels_are_escaped(publication):
    odd = ServicePortName('a"b', "c\\d", "e\nf", Protocol.TCP)
    publication.set_balancer(balancer(odd))
    got = scrape(facts(publication, balancer(odd)))
    labels = {"namespace": 'a"b', "service": "c\\d", "port": "e\nf", "protocol": "TCP"}
    assert of(got, "proxyd_connections_total", **labels) == 0


def test_series_are_bounded_and_what_is_beyond_is_counted(publication, monkeypatch):
    monkeypatch.setattr(exposition, "MAX_SERVICE_PORTS", 3)
    monkeypatch.setattr(exposition, "MAX_ENDPOINTS", 4)
    ports = [balancer(ServicePortName("prod", f"web-{n}", "", Protocol.TCP)) for n in range(5)]
    for one in ports:
        publication.set_balancer(one)
    metrics = Metrics()
    got = scrape(facts(publication, *ports), metrics)
    listed = {dict(labels)["service"] for name, labels in got if name == "proxyd_connections_total"}
    assert listed == {"web-0", "web-1", "web-2"}
    assert len([1 for name, _ in got if name == "proxyd_endpoint_connections_total"]) == 4
    assert of(got, "proxyd_metrics_unlisted", what="service_ports") == 2
    assert of(got, "proxyd_metrics_unlisted", what="endpoints") == 6


def test_the_choice_stays_when_others_come():
    chosen = Chosen(3)
    a, b, c, d = (ServicePortName("n", name, "", Protocol.TCP) for name in "abcd")
    assert chosen.choose({b: 1, c: 1}) == {b, c}
    assert chosen.choose({a: 2, b: 1, c: 1, d: 1}) == {b, c, d}
    assert chosen.choose({a: 2, b: 1}) == {a, b}


def test_workers():
    mine = WorkerState(index=0, pid=os.getpid(), ready=True, lag=2, restarts=1)
    gone = WorkerState(index=1, pid=0, ready=False, lag=5, restarts=3)
    got = scrape(Facts(phase="serving", healthy=True, workers=(mine, gone)))
    assert [of(got, "proxyd_worker_up", worker=worker) for worker in "01"] == [1, 0]
    assert [of(got, "proxyd_worker_restarts_total", worker=worker) for worker in "01"] == [1, 3]
    assert [of(got, "proxyd_worker_generation_lag", worker=worker) for worker in "01"] == [2, 5]
    assert of(got, "proxyd_worker_resident_memory_bytes", worker="0") > 1e6
    assert of(got, "proxyd_worker_resident_memory_bytes", worker="1") is None


def test_the_process_and_the_build():
    got = scrape(Facts(phase="draining", healthy=False, problems={"error": 2}))
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    since_boot = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    assert abs(of(got, "process_start_time_seconds") - (time.time() - since_boot)) < 60
    assert of(got, "process_open_fds") > 3
    assert [dict(labels)["version"] for name, labels in got if name == "proxyd_build_info"]
    assert of(got, "proxyd_phase", phase="draining") == 1
    assert of(got, "proxyd_healthy") == 0
    assert of(got, "proxyd_manifest_problems", severity="error") == 2
    assert of(got, "proxyd_manifest_problems", severity="warning") == 0


def test_kube_proxys_names():
    metrics = Metrics()
    one, other = object(), object()
    slices = {"a": (EndpointSlice(metadata=ObjectMeta(name="a")),)}
    metrics.changed(Snapshot(services={"a": one, "b": one}, slices=slices))
    got = scrape(Facts(phase="serving", healthy=True), metrics)
    assert of(got, "kubeproxy_sync_proxy_rules_service_changes_pending") == 2
    metrics.reconciled(0.003)
    # One changed, one went, one came.
    metrics.changed(Snapshot(services={"a": other, "c": one}, slices=slices))
    metrics.health("/healthz", 200)
    metrics.health("/livez", 503)
    got = scrape(Facts(phase="serving", healthy=True), metrics)
    assert of(got, "kubeproxy_sync_proxy_rules_service_changes_total") == 5
    assert of(got, "kubeproxy_sync_proxy_rules_service_changes_pending") == 3
    assert of(got, "kubeproxy_sync_proxy_rules_endpoint_changes_total") == 1
    assert of(got, "kubeproxy_sync_proxy_rules_endpoint_changes_pending") == 0
    assert of(got, "kubeproxy_sync_proxy_rules_duration_seconds_bucket", le="0.002") == 0
    assert of(got, "kubeproxy_sync_proxy_rules_duration_seconds_bucket", le="0.004") == 1
    assert of(got, "kubeproxy_sync_proxy_rules_duration_seconds_bucket", le="16.384") == 1
    assert of(got, "kubeproxy_proxy_healthz_total", code="200") == 1
    assert of(got, "kubeproxy_proxy_livez_total", code="503") == 1
    for name in ("last_timestamp", "last_queued_timestamp"):
        assert abs(of(got, f"kubeproxy_sync_proxy_rules_{name}_seconds") - time.time()) < 60


def test_kinds_of_trouble_are_bounded():
    metrics = Metrics()
    for number in range(MAX_TROUBLES + 20):
        metrics.trouble(f"kind {number}", 2)
    metrics.trouble("kind 0", 1)
    got = scrape(Facts(phase="serving", healthy=True), metrics)
    troubles = {
        dict(labels)["kind"]: value for (name, labels), value in got.items() if name == "proxyd_trouble_total"
    }
    assert len(troubles) == MAX_TROUBLES + 1
    assert troubles["kind 0"] == 3
    assert troubles["other"] == 40


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:kubeproxy|proxyd|process|rest_client|kubernetes_build)_[a-z_]+", expression))


def expressions(value: object) -> Iterator[str]:
    """Every PromQL expression in a dashboard."""
    if isinstance(value, dict):
        for key, below in value.items():
            if key in {"expr", "query", "definition"} and isinstance(below, str):
                yield below
            else:
                yield from expressions(below)
    elif isinstance(value, list):
        for below in value:
            yield from expressions(below)


@pytest.fixture
def exported(publication) -> set[str]:
    """The names of every series that there can be."""
    metrics = Metrics()
    metrics.health("/healthz", 200)
    metrics.health("/livez", 200)
    metrics.trouble("x", 1)
    all_three = balancer(), balancer(DNS), balancer(HSS)
    for one in all_three:
        publication.set_balancer(one)
    worker = WorkerState(index=0, pid=os.getpid(), ready=True, lag=0, restarts=0)
    cluster = ClusterFacts(
        requests={("200", "GET", "api:6443"): 3},
        durations={("GET", "api:6443"): ((1, 2, 0), 0.7)},
        bounds=(0.1, 1.0),
    )
    return {
        name
        for name, _ in scrape(facts(publication, *all_three, workers=(worker,), cluster=cluster), metrics)
    }


def test_requests_to_the_api_server():
    cluster = ClusterFacts(
        requests={("200", "GET", "api:6443"): 3, ("<error>", "GET", "api:6443"): 1},
        durations={("GET", "api:6443"): ((1, 2, 1), 7.5)},
        bounds=(0.1, 1.0),
        lists=4,
        synced=True,
    )
    got = scrape(Facts(phase="serving", healthy=True, cluster=cluster))
    place = {"host": "api:6443"}
    assert of(got, "rest_client_requests_total", code="200", method="GET", **place) == 3
    assert of(got, "rest_client_requests_total", code="<error>", method="GET", **place) == 1
    name = "rest_client_request_duration_seconds"
    buckets = [of(got, f"{name}_bucket", verb="GET", le=le, **place) for le in ("0.1", "1.0", "+Inf")]
    assert buckets == [1, 3, 4]
    assert of(got, f"{name}_sum", verb="GET", **place) == 7.5
    assert of(got, f"{name}_count", verb="GET", **place) == 4
    assert of(got, "proxyd_cluster_lists_total") == 4
    assert of(got, "proxyd_cluster_synced") == 1


def test_every_metric_of_the_dashboards_is_exported(exported):
    found = sorted(DASHBOARDS.glob("*.json"))
    assert found
    for path in found:
        dashboard = json.loads(path.read_text())
        assert dashboard["uid"]
        wanted = set().union(*map(names_in, expressions(dashboard)))
        assert len(wanted) > 15
        assert wanted <= exported, path
        panels = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(panels)) == len(panels)


def test_every_metric_is_documented(exported):
    documented = names_in((REPOSITORY / "docs" / "metrics.md").read_text())
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported}
    assert {name for name in families if not name.startswith("process_")} <= documented
    # And nothing is documented that there is not.
    assert {name for name in documented if not name.endswith("_")} <= families | exported


def test_every_metric_of_the_alerts_is_exported(exported):
    (document,) = read_documents((RULES / "proxyd.rules.yaml").read_bytes())
    assert isinstance(document, Document)
    rules = [rule for group in document.value["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    for rule in rules:
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["annotations"]["summary"]
        assert names_in(rule["expr"])
        assert names_in(rule["expr"]) <= exported, rule["alert"]


def test_promtool_accepts_alerts_and_metrics(publication):
    promtool = shutil.which("promtool", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if promtool is None:
        pytest.skip("promtool is not installed: `make test` fetches it")
    for command in (["check", "rules", "proxyd.rules.yaml"], ["test", "rules", "proxyd.test.yaml"]):
        done = subprocess.run([promtool, *command], cwd=RULES, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    publication.set_balancer(balancer())
    text = b"".join(Metrics().render(facts(publication, balancer())))
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    assert done.returncode in {0, 3}, done.stderr  # 3: advice on style
    assert b"error while linting" not in done.stderr


# Health


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def checked(clock) -> Health:
    return Health(60, clock=clock, wall=lambda: 1_700_000_000 + clock.now)


def test_a_change_that_waits_too_long(clock, checked):
    assert checked.look().healthy
    checked.queued()
    clock.now += 40
    checked.queued()
    clock.now += 20
    assert checked.look().healthy
    clock.now += 1
    assert checked.look().reasons == ("a change has waited for 61 s to be carried out",)
    checked.updated()
    assert checked.look().healthy


def test_a_worker_that_does_not_acknowledge(clock, checked):
    checked.published(1)
    clock.now += 50
    checked.published(2)
    checked.acknowledged(0)
    clock.now += 11
    assert checked.look().reasons == ("a worker has not acknowledged a change for 61 s",)
    checked.acknowledged(1)
    assert checked.look().healthy
    clock.now += 50
    assert not checked.look().healthy
    checked.acknowledged(2)
    assert checked.look().healthy


def test_steady_changes_that_are_acknowledged_late_but_in_time_are_healthy(clock, checked):
    for generation in range(1, 10_000):
        checked.published(generation)
        clock.now += 0.1
        checked.acknowledged(generation - 100)  # ten seconds behind
        assert checked.look().healthy, generation
    assert len(checked._unacknowledged) < 50
    for generation in range(10_000, 11_000):
        checked.published(generation)
        clock.now += 0.1
    assert not checked.look().healthy
    assert len(checked._unacknowledged) < 50
    checked.acknowledged(10_999)
    assert checked.look().healthy


def test_the_bodies(clock, checked):
    code, body = health.healthz(checked.look())
    assert code == 200
    now = "2023-11-14T22:30:00.000000Z"
    family = {"lastUpdated": now, "healthy": True}
    answer = {"lastUpdated": now, "currentTime": now, "nodeEligible": True, "healthy": True}
    assert json.loads(body) == {**answer, "status": {"IPv4": family, "IPv6": family}}

    checked.updated()
    checked.queued()
    clock.now += 100
    code, body = health.livez(checked.look())
    answer = json.loads(body)
    assert code == 503
    assert "nodeEligible" not in answer
    assert (answer["lastUpdated"], answer["currentTime"]) == (now, "2023-11-14T22:31:40.000000Z")
    assert answer["healthy"] is False
    assert answer["reasons"] == ["a change has waited for 100 s to be carried out"]


def test_a_node_that_is_not_eligible_is_alive(checked):
    checked.eligible = False
    code, body = health.healthz(checked.look())
    assert (code, json.loads(body)["nodeEligible"]) == (503, False)
    assert health.livez(checked.look())[0] == 200


def test_no_update_yet_is_gos_zero_time(clock, checked):
    checked.queued()
    clock.now += 100
    assert json.loads(health.healthz(checked.look())[1])["lastUpdated"] == "0001-01-01T00:00:00Z"
