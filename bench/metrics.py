"""What is measured: each figure's name, unit, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One figure.

    `better` is "" for a figure that only explains others. `plot` is its name in the plot, "" where it is not there.
    """

    key: str
    title: str
    unit: str
    better: Literal["lower", "higher", ""] = "lower"
    plot: str = ""

    @property
    def section(self) -> str:
        """The section that measures it."""
        return self.key.split(".", 1)[0]


@dataclass(frozen=True)
class Section:
    """One measurement: its name, its heading, and who takes part in it."""

    name: str
    title: str
    protocol: Literal["tcp", "udp"] = "tcp"


SECTIONS = (
    Section("connections", "Connections: connect, one request, close; 64 at a time, 1 worker"),
    Section("workers", "Workers: the same with 1 and 2, nothing pinned"),
    Section("requests", "Requests on kept connections, 1 worker"),
    Section("latency", "Latency added to 2,000 requests/s on 50 kept connections"),
    Section("bulk", "Bulk: one stream and eight, to the client (down) and from it (up)"),
    Section("memory", "Memory: at rest, and of 5,000 idle connections"),
    Section("scale", "Size: 1,000 and 10,000 listeners"),
    Section("churn", "Churn: 1,000 connections/s while endpoints change 100 times a second"),
    Section("udp", "UDP: queries of 100 bytes on 64 flows", protocol="udp"),
)

_BULK = (
    metric
    for streams, word in ((1, "one stream"), (8, "eight streams"))
    for direction in ("down", "up")
    for metric in (
        Metric(
            f"bulk.{streams}.{direction}.cpu",
            f"CPU, {word} {direction}",
            "s/GB",
            plot=f"bulk, {word} {direction}" if streams == 1 else "",
        ),
        Metric(f"bulk.{streams}.{direction}.rate", f"rate, {word} {direction}", "GB/s", "higher"),
    )
)
_SCALE = (
    metric
    for size in (1000, 10000)
    for metric in (
        Metric(f"scale.{size}.start", f"start to all of {size:,} serving", "s"),
        Metric(f"scale.{size}.rss", f"resident, {size:,} listeners, all processes", "MB"),
        Metric(f"scale.{size}.pss", f"proportional, {size:,} listeners, all processes", "MB"),
        Metric(
            f"scale.{size}.change",
            f"one change in force, {size:,} listeners",
            "ms",
            plot=f"one change, {size:,} listeners",
        ),
    )
)
METRICS = (
    Metric("connections.cpu", "CPU per connection", "µs", plot="connection"),
    Metric("connections.user", "of it user", "µs", ""),
    Metric("connections.system", "of it system", "µs", ""),
    Metric("connections.rate", "connections", "/s", "higher"),
    Metric("connections.busy", "of its CPU the proxy used", "%", ""),
    Metric("connections.waiting", "sockets in TIME_WAIT at the end, client and node", "", ""),
    Metric("workers.one", "CPU per connection, 1 worker", "µs", ""),
    Metric("workers.two", "CPU per connection, 2 workers", "µs", plot="connection, 2 workers"),
    Metric("workers.ratio", "2 workers : 1 worker", ""),
    Metric("workers.rate", "connections, 2 workers", "/s", "higher"),
    *(
        metric
        for count in (1, 50, 1000)
        for metric in (
            Metric(
                f"requests.{count}.cpu",
                f"CPU per request, {count:,} connection{'s' if count > 1 else ''}",
                "µs",
                plot=f"request, {count:,} kept",
            ),
            Metric(f"requests.{count}.rate", f"requests, {count:,}", "/s", "higher"),
        )
    ),
    Metric("requests.50.busy", "of its CPU the proxy used, 50 connections", "%", ""),
    Metric("latency.p50", "added, p50", "µs", plot="latency added, p50"),
    Metric("latency.p99", "added, p99", "µs", plot="latency added, p99"),
    Metric("latency.direct.p50", "without a proxy, p50", "µs", ""),
    Metric("latency.direct.p99", "without a proxy, p99", "µs", ""),
    *_BULK,
    Metric("memory.rest", "at rest, proportional, all processes", "MB"),
    Metric("memory.rest.rss", "at rest, resident, all processes", "MB"),
    Metric("memory.connection", "process, per idle connection", "KiB", plot="memory, idle connection"),
    Metric("memory.kernel", "kernel, per idle connection", "KiB"),
    *_SCALE,
    Metric("churn.quiet.p99", "p99, endpoints stay", "µs", ""),
    Metric("churn.p99", "p99, endpoints change", "µs"),
    Metric("churn.ratio", "change : stay", ""),
    Metric("churn.errors", "errors", ""),
    Metric("churn.cpu", "CPU per change", "µs", ""),
    Metric("udp.live.cpu", "CPU per query, live flows, as many as go", "µs", plot="UDP query"),
    Metric("udp.live.rate", "queries, live flows", "/s", "higher"),
    Metric("udp.live.busy", "of its CPU the proxy used meanwhile", "%", ""),
    Metric("udp.paced.cpu", "CPU per query, live flows, 10,000/s", "µs", plot="UDP query, 10,000/s"),
    Metric("udp.fresh.cpu", "CPU per query, each on a new flow", "µs", plot="UDP query, new flow"),
    Metric("udp.fresh.rate", "queries, each on a new flow", "/s", "higher"),
    Metric("udp.loss", "lost at 20,000/s", "%"),
)
BY_KEY = {metric.key: metric for metric in METRICS}
