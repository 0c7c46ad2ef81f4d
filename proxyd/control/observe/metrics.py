"""Metrics: what control counts, what each scrape asks the daemon for, and both as Prometheus text."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections import Counter as Count
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from proxyd import __version__
from proxyd.api.service import Protocol
from proxyd.control.feeds.facts import ClusterFacts
from proxyd.control.observe import cluster_metrics, exposition
from proxyd.control.observe.exposition import (
    ENDPOINT_FAMILIES,
    PORT_FAMILIES,
    SCTP_FAMILIES,
    UDP_FAMILIES,
    Chosen,
    Row,
)
from proxyd.control.observe.programming_latency import ProgrammingLatency
from proxyd.control.workers.publication import Publication
from proxyd.state.changes import touched
from proxyd.state.snapshot import Snapshot
from proxyd.state.spec import BalancerSpec, Endpoint, ListenerState, ListenerStatus, ServicePortName

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_TROUBLES = 50  # kinds of trouble that are told apart

# Nobody reads the times at which counters began, and they would double the series of counters.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no annotation there


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """One worker at the time of a scrape."""

    index: int
    pid: int  # 0: it does not run
    ready: bool
    lag: int  # generations it has not acknowledged
    restarts: int


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon at the time of a scrape: collected in the loop, which is quick, and rendered in a thread.

    The thread asks `publication` only for counters, which is safe.
    """

    phase: str
    healthy: bool
    endpoints: bool = True  # a series for each endpoint
    balancers: tuple[BalancerSpec, ...] = ()
    wanted: int = 0  # listeners that are to be open
    failed: int = 0  # how many of these could not be opened
    unopened: tuple[ListenerStatus, ...] = ()  # listeners that are not to be open
    services: int = 0
    publication: Publication | None = None
    generation: int = 0
    workers: tuple[WorkerState, ...] = ()
    problems: Mapping[str, int] = {}  # by severity
    synced_at: float = 0.0
    cluster: ClusterFacts | None = None  # None: the daemon follows no API server
    access_written: int = 0
    access_dropped: int = 0
    access_queued: int = 0


_NO_FACTS = Facts(phase="starting", healthy=True)


class Metrics:
    """Counts what happens in control, and renders all metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._traffic = _Traffic()
        self._scrape = _Scrape(self._traffic)
        self._troubles: set[str] = set()
        self._before: Snapshot | None = None
        counter, gauge = self._counter, self._gauge
        # The names of kubernetes pkg/proxy/metrics/metrics.go.
        self._sync_seconds = Histogram(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "Time to carry out what changed: plan, routes, rules, sockets, and telling the workers.",
            buckets=[0.001 * 2**power for power in range(15)],
            registry=self.registry,
        )
        self._last_sync = gauge(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds", "When changes were last carried out."
        )
        self._last_queued = gauge(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", "When a change last came."
        )
        self._changes = {
            kind: (
                gauge(f"kubeproxy_sync_proxy_rules_{kind}_changes_pending", f"Changes of {text} that wait."),
                counter(f"kubeproxy_sync_proxy_rules_{kind}_changes_total", f"Changes of {text} that came."),
            )
            for kind, text in (("service", "Services"), ("endpoint", "EndpointSlices"))
        }
        self.programming = ProgrammingLatency(
            Histogram(
                "kubeproxy_network_programming_duration_seconds",
                "Time from a change of a Service or Pod until all workers have the endpoints that it led to.",
                buckets=cluster_metrics.PROGRAMMING_BUCKETS,
                registry=self.registry,
            ).observe
        )
        self._healthz = counter("kubeproxy_proxy_healthz_total", "Answers of /healthz.", "code")
        self._livez = counter("kubeproxy_proxy_livez_total", "Answers of /livez.", "code")
        # proxyd's own.
        self._sync_failures = counter(
            "proxyd_reconcile_failures_total", "Reconciles that ended in an internal error."
        )
        self._trouble = counter("proxyd_trouble_total", "What workers met with, by kind.", "kind")
        self._config = gauge(
            "proxyd_config_last_reload_successful", "Whether the configuration read last is valid."
        )
        self._config.set(1)
        self._seconds = gauge("proxyd_scrape_seconds", "How long writing the previous answer took.")
        self.registry.register(_Process(registry=None))
        self.registry.register(self._scrape)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def changed(self, snapshot: Snapshot) -> None:
        """A new snapshot came."""
        before, self._before = self._before or Snapshot(), snapshot
        self._last_queued.set_to_current_time()
        for kind, old, new in (
            ("service", before.services, snapshot.services),
            ("endpoint", before.slices, snapshot.slices),
        ):
            # Objects that did not change are mostly the very same; a few are only equal.
            names = [name for name in touched(old, new) if old.get(name) != new.get(name)]
            count = len(names)
            if not count:
                continue
            if kind == "endpoint":
                self.programming.changed(names, before.slices, snapshot.slices)
            pending, total = self._changes[kind]
            pending.inc(count)
            total.inc(count)

    def reconciled(self, seconds: float, generation: int = 0) -> None:
        """A reconcile took so many seconds and led to this generation; nothing waits any more."""
        self.programming.reconciled(generation)
        self._sync_seconds.observe(seconds)
        self._last_sync.set_to_current_time()
        for pending, _ in self._changes.values():
            pending.set(0)

    def reconcile_failed(self) -> None:
        """A reconcile ended in an internal error."""
        self._sync_failures.inc()

    def trouble(self, kind: str, count: int) -> None:
        """A worker reported a kind of trouble so many times."""
        if kind not in self._troubles and len(self._troubles) >= MAX_TROUBLES:
            kind = exposition.OTHER
        self._troubles.add(kind)
        self._trouble.labels(kind).inc(count)

    def health(self, path: str, code: int) -> None:
        """An answer of /healthz or /livez was given."""
        (self._healthz if path == "/healthz" else self._livez).labels(str(code)).inc()

    def config_read(self, valid: bool) -> None:
        """The configuration was read again."""
        self._config.set(valid)

    def render(self, facts: Facts) -> list[bytes]:
        """All metrics as text, in parts. Only one thread at a time may call it."""
        began = time.perf_counter()
        self._scrape.facts = facts
        traffic = self._traffic.render(facts)
        data = [generate_latest(self.registry), *traffic]
        self._scrape.facts = _NO_FACTS
        self._seconds.set(time.perf_counter() - began)
        return data


class _Traffic:
    """The families of service ports and endpoints."""

    def __init__(self) -> None:
        self.unlisted_ports = 0
        self.unlisted_endpoints = 0
        self._ports = Chosen(exposition.MAX_SERVICE_PORTS)
        self._endpoints = Chosen(exposition.MAX_ENDPOINTS)

    def render(self, facts: Facts) -> list[bytes]:
        """Their text, in parts."""
        table, endpoints = exposition.Table(PORT_FAMILIES), exposition.Table(ENDPOINT_FAMILIES)
        special = {
            Protocol.UDP: exposition.Table(UDP_FAMILIES),
            Protocol.SCTP: exposition.Table(SCTP_FAMILIES),
        }
        balancers: dict[ServicePortName, list[BalancerSpec]] = {
            status.service_port: [] for status in facts.unopened
        }
        for balancer in facts.balancers:
            balancers.setdefault(balancer.key.service_port, []).append(balancer)
        listed = self._ports.choose(dict.fromkeys(balancers, 1))
        sizes = {port: _size(mine) for port, mine in balancers.items() if mine} if facts.endpoints else {}
        detailed = self._endpoints.choose({port: size for port, size in sizes.items() if port in listed})
        self.unlisted_ports = len(balancers) - len(listed)
        self.unlisted_endpoints = sum(size for port, size in sizes.items() if port not in detailed)
        publication = facts.publication
        if publication is not None:
            for port in sorted(listed):
                labels = exposition.port_labels(port)
                keys = publication.balancer_keys(port)
                row = exposition.add([publication.row(key) for key in keys])
                table.add(labels, row)
                if port.protocol in special:
                    special[port.protocol].add(labels, row)
                if port in detailed:
                    for endpoint, row in _rows(publication, balancers[port]):
                        endpoints.add(exposition.endpoint_labels(labels, endpoint), row)
        more = [chunk for one in special.values() for chunk in one.chunks()]
        return [*table.chunks(), *more, *(endpoints.chunks() if facts.endpoints else ())]


def _size(balancers: Sequence[BalancerSpec]) -> int:
    """How many different endpoints they have."""
    if len(balancers) == 1:
        return len(balancers[0].endpoints)
    return len({endpoint for balancer in balancers for endpoint in balancer.endpoints})


def _rows(publication: Publication, balancers: Sequence[BalancerSpec]) -> Iterator[tuple[Endpoint, Row]]:
    """The endpoints of a service port's balancers, each once."""
    if len(balancers) == 1:
        (balancer,) = balancers
        for endpoint in balancer.endpoints:
            yield endpoint, publication.row((balancer.key, endpoint))
        return
    found: dict[Endpoint, list[Row]] = {}
    for balancer in balancers:
        for endpoint in balancer.endpoints:
            found.setdefault(endpoint, []).append(publication.row((balancer.key, endpoint)))
    for endpoint, rows in found.items():
        yield endpoint, exposition.add(rows)


class _Scrape(Collector):
    """The families that each scrape makes of `facts`, all but the traffic's."""

    def __init__(self, traffic: _Traffic) -> None:
        self.facts = _NO_FACTS
        self._traffic = traffic

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not look for clashes, as all names are here."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every family."""
        facts = self.facts
        yield _labelled(
            "proxyd_build_info",
            "The version.",
            ("version", "python"),
            {(__version__, platform.python_version()): 1},
        )
        yield cluster_metrics.build_info()
        if facts.cluster is not None:
            yield from cluster_metrics.families(facts.cluster)
        yield GaugeMetricFamily("proxyd_healthy", "Whether /livez says so.", value=facts.healthy)
        phases = {(phase,): phase == facts.phase for phase in ("starting", "serving", "draining")}
        yield _labelled("proxyd_phase", "What the daemon is doing.", ("phase",), phases)
        yield GaugeMetricFamily("proxyd_services", "Services known.", value=facts.services)
        yield _labelled("proxyd_listeners", "Listeners wanted, by state.", ("state",), _listeners(facts))
        yield GaugeMetricFamily(
            "proxyd_generation", "The newest state the workers were told.", value=facts.generation
        )
        problems = {(severity,): facts.problems.get(severity, 0) for severity in ("error", "warning")}
        yield _labelled("proxyd_manifest_problems", "What is wrong with manifests.", ("severity",), problems)
        yield GaugeMetricFamily(
            "proxyd_manifest_last_read_timestamp_seconds",
            "When manifests were last read.",
            value=facts.synced_at,
        )
        yield CounterMetricFamily(
            "proxyd_access_log_records", "Records in the access log.", value=facts.access_written
        )
        yield CounterMetricFamily(
            "proxyd_access_log_dropped",
            "Records that the access log had no room for.",
            value=facts.access_dropped,
        )
        yield GaugeMetricFamily("proxyd_access_log_queued", "Records that wait.", value=facts.access_queued)
        traffic = self._traffic
        unlisted = {
            ("service_ports",): traffic.unlisted_ports,
            ("endpoints",): traffic.unlisted_endpoints,
        }
        yield _labelled("proxyd_metrics_unlisted", "Beyond the limits of this list.", ("what",), unlisted)
        yield from _workers(facts.workers)


def _labelled(name: str, text: str, labels: Sequence[str], values: Mapping[Any, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _listeners(facts: Facts) -> dict[tuple[str, ...], float]:
    counts = Count(status.state for status in facts.unopened)
    counts[ListenerState.FAILED] += facts.failed
    counts[ListenerState.SERVING] += facts.wanted - facts.failed
    return {(str(state),): counts[state] for state in ListenerState}


def _workers(workers: Sequence[WorkerState]) -> Iterator[Metric]:
    up = GaugeMetricFamily("proxyd_worker_up", "Whether the worker runs.", labels=("worker",))
    restarts = CounterMetricFamily(
        "proxyd_worker_restarts", "How often it was started again.", labels=("worker",)
    )
    lag = GaugeMetricFamily(
        "proxyd_worker_generation_lag", "Generations it has not acknowledged.", labels=("worker",)
    )
    cpu = CounterMetricFamily("proxyd_worker_cpu_seconds", "Processor time it took.", labels=("worker",))
    memory = GaugeMetricFamily("proxyd_worker_resident_memory_bytes", "Memory it has.", labels=("worker",))
    for worker in workers:
        label = (str(worker.index),)
        up.add_metric(label, worker.ready)
        restarts.add_metric(label, worker.restarts)
        lag.add_metric(label, worker.lag)
        if worker.pid and (used := _used(worker.pid)):
            cpu.add_metric(label, used[0])
            memory.add_metric(label, used[1])
    yield from (up, restarts, lag, cpu, memory)


def _used(pid: int) -> tuple[float, int] | None:
    """Processor seconds and resident bytes of a process: proc_pid_stat(5)."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    return (int(fields[11]) + int(fields[12])) / ticks, int(fields[21]) * resource.getpagesize()


class _Process(ProcessCollector):
    """process_*, which works without /proc/stat too: ProcSubset=pid in a systemd unit hides it."""

    def _boot_time(self) -> float:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
