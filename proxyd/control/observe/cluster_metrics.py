"""Metrics that every part of a Kubernetes cluster has: requests to the API server, and the build."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from proxyd import __version__
from proxyd.control.feeds.facts import ClusterFacts

# kubernetes pkg/proxy/metrics/metrics.go, network_programming_duration_seconds
PROGRAMMING_BUCKETS = (0, 0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))


def families(facts: ClusterFacts) -> Iterator[Metric]:
    """The families of a daemon that follows an API server."""
    requests = CounterMetricFamily(
        "rest_client_requests", "Requests to the API server.", labels=("code", "host", "method")
    )
    for (code, method, host), count in facts.requests.items():
        requests.add_metric((code, host, method), count)
    yield requests
    durations = HistogramMetricFamily(
        "rest_client_request_duration_seconds",
        "Time until the headers of the answer.",
        labels=("host", "verb"),
    )
    for (verb, host), (buckets, total) in facts.durations.items():
        durations.add_metric((host, verb), _cumulative(buckets, facts.bounds), total)
    yield durations
    yield CounterMetricFamily(
        "proxyd_cluster_events_dropped",
        "Events that did not get to the API server.",
        value=facts.events_dropped,
    )
    yield CounterMetricFamily(
        "proxyd_cluster_lists",
        "Full lists that were taken in: one of each kind, and then relists.",
        value=facts.lists,
    )
    yield GaugeMetricFamily(
        "proxyd_cluster_problems",
        "What is wrong with the API server or its objects: watches that fail, objects that cannot be used.",
        value=facts.problems,
    )
    yield GaugeMetricFamily(
        "proxyd_cluster_synced", "Whether the API server's objects have been listed.", value=facts.synced
    )
    yield GaugeMetricFamily(
        "proxyd_cluster_last_event_timestamp_seconds",
        "When the API server last sent a list or a change.",
        value=facts.last_event,
    )


def build_info() -> Metric:
    """kubernetes_build_info of this program, with the labels that the metric has everywhere."""
    major, _, rest = __version__.partition(".")
    labels = {
        "major": major,
        "minor": rest.partition(".")[0],
        "git_version": f"v{__version__}",
        "git_commit": "",
        "git_tree_state": "",
        "build_date": "",
        "go_version": "",
        "compiler": platform.python_implementation().lower(),
        "platform": f"linux/{platform.machine()}",
    }
    family = GaugeMetricFamily(
        "kubernetes_build_info", "What is running: proxyd and its version.", labels=tuple(labels)
    )
    family.add_metric(tuple(labels.values()), 1)
    return family


def _cumulative(buckets: Sequence[int], bounds: Sequence[float]) -> list[tuple[str, float]]:
    found = []
    total = 0
    for bound, count in zip((*map(str, bounds), "+Inf"), buckets, strict=True):
        total += count
        found.append((bound, float(total)))
    return found
