"""The measurements of TCP under load: each is a function that runs one proxy once and returns its figures by key.

The keys are those of bench/metrics.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench import load as http_load
from bench.harness import BULK, HTTP_TARGETS, WEB, Bench
from bench.net import HTTP_PORT, pod_ip
from bench.peers import Proxy
from bench.pods import ask
from bench.processes import BenchError, CpuMeter, memory
from tests.support.waiting import wait_for

Figures = dict[str, float]
CONNECTIONS = 64
LATENCY_RATE = 2000.0
CHURN_RATE = 1000.0
CHANGES_A_SECOND = 100


def connections(bench: Bench, kind: type[Proxy]) -> Figures:
    """Connect, one request, close; as many as go."""
    with bench.serving(kind, WEB) as proxy:
        found = bench.wrk(proxy, CONNECTIONS, close=True)
        waiting = bench.lab.sockets(bench.lab.client)["tw"] + bench.lab.sockets(bench.lab.node)["tw"]
    count = found.operations
    return {
        "connections.cpu": found.micros,
        "connections.user": found.cpu.user / count * 1e6,
        "connections.system": found.cpu.system / count * 1e6,
        "connections.rate": found.rate,
        "connections.busy": found.busy,
        "connections.waiting": waiting,
    }


def workers(bench: Bench, kind: type[Proxy]) -> Figures:
    """The same with one and with two workers; nothing is pinned, as two workers and the load need every CPU."""
    with bench.unpinned():
        with bench.serving(kind, WEB) as proxy:
            one = bench.wrk(proxy, CONNECTIONS, close=True)
        with bench.serving(kind, WEB, workers=2) as proxy:
            two = bench.wrk(proxy, CONNECTIONS, close=True)
    return {
        "workers.one": one.micros,
        "workers.two": two.micros,
        "workers.ratio": two.micros / one.micros,
        "workers.rate": two.rate,
    }


def requests(bench: Bench, kind: type[Proxy]) -> Figures:
    """Requests on kept connections; as many as go."""
    figures: Figures = {}
    with bench.serving(kind, WEB) as proxy:
        for count in (1, 50, 1000):
            found = bench.wrk(proxy, count, close=False)
            figures[f"requests.{count}.cpu"] = found.micros
            figures[f"requests.{count}.rate"] = found.rate
            if count == 50:
                figures["requests.50.busy"] = found.busy
    return figures


def latency(bench: Bench, kind: type[Proxy]) -> Figures:
    """What the proxy adds to the time of a request at a rate that saturates nothing."""
    with bench.serving(kind, WEB) as proxy:
        direct = bench.paced(HTTP_TARGETS, LATENCY_RATE, kept=50)
        proxied = bench.paced([proxy.address(WEB.name)], LATENCY_RATE, kept=50)
    if direct["errors"] or proxied["errors"]:
        raise BenchError(f"{proxy.name}: errors: {proxied['errors']}, direct {direct['errors']}")
    return {
        "latency.p50": proxied["p50_us"] - direct["p50_us"],
        "latency.p99": proxied["p99_us"] - direct["p99_us"],
        "latency.direct.p50": direct["p50_us"],
        "latency.direct.p99": direct["p99_us"],
    }


def bulk(bench: Bench, kind: type[Proxy]) -> Figures:
    """Streams of bytes from the pod and to it."""
    figures: Figures = {}
    with bench.serving(kind, WEB, BULK) as proxy:
        for streams, direction in itertools.product((1, 8), ("down", "up")):
            host, port = proxy.address(BULK.name)
            seconds = str(max(1, round(bench.effort.seconds)))
            words = ["iperf3", "-c", host, "-p", str(port), "-t", seconds, "-P", str(streams), "-J"]
            meter = CpuMeter(proxy.pid)
            with (
                bench.iperf_server(),
                bench.client(*words, *(["-R"] if direction == "down" else [])) as client,
            ):
                told = json.loads(client.finish(60, "iperf3"))
            cpu = meter.lap()
            if "error" in told:
                raise BenchError(f"{proxy.name}: iperf3: {told['error']}")
            sent, received = told["end"]["sum_sent"], told["end"]["sum_received"]
            # At the end of the time some is still on its way, so that less may be received than was sent.
            if not 0 < received["bytes"] <= sent["bytes"]:
                raise BenchError(f"{proxy.name}: {sent['bytes']} bytes sent, {received['bytes']} received")
            figures[f"bulk.{streams}.{direction}.cpu"] = cpu.total / (received["bytes"] / 1e9)
            figures[f"bulk.{streams}.{direction}.rate"] = received["bits_per_second"] / 8e9
    return figures


def idle(bench: Bench, kind: type[Proxy]) -> Figures:
    """Memory at rest, and for each connection that was asked once and is idle."""
    count = bench.effort.idle
    direct = _kernel_memory(bench, ",".join(f"{pod_ip(n)}:{HTTP_PORT}" for n in range(1, 4)))
    with bench.serving(kind, WEB) as proxy:
        time.sleep(bench.effort.warm)
        before = memory(proxy.pid)
        host, port = proxy.address(WEB.name)
        grown: list[int] = []
        kernel = _kernel_memory(
            bench, f"{host}:{port}", lambda: grown.append(memory(proxy.pid).resident - before.resident)
        )
    return {
        "memory.rest": before.proportional / 1e6,
        "memory.rest.rss": before.resident / 1e6,
        "memory.connection": grown[0] / count / 1024,
        "memory.kernel": (kernel - direct) / count / 1024,
    }


def _kernel_memory(bench: Bench, addresses: str, meanwhile: object = None) -> float:
    """Bytes that the machine's kernel takes for idle connections to some addresses, at both ends and between."""

    def now() -> float:
        slab = next(
            line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Slab:")
        )
        pages = bench.lab.sockets(bench.lab.node)["mem"]
        return int(slab.split()[1]) * 1024 + pages * os.sysconf("SC_PAGE_SIZE")

    count = bench.effort.idle
    before = now()
    with bench.script(http_load, "idle", addresses, "--connections", str(count)) as client:
        time.sleep(bench.effort.warm)
        grown = now() - before
        if callable(meanwhile):
            meanwhile()
        found = bench.go(client)
    if found["answers"] != count:
        raise BenchError(f"{found['answers']} of {count} idle connections answered again: {found['errors']}")
    return grown


def churn(bench: Bench, kind: type[Proxy]) -> Figures:
    """Connections at a fixed rate, in quiet and while the endpoints change all the time; nothing where they can't."""
    if not kind.live_change:
        return {}
    service = replace(WEB, changing=True)
    with bench.serving(kind, service) as proxy:
        address = [proxy.address(service.name)]
        meter = CpuMeter(proxy.pid)
        quiet = bench.paced(address, CHURN_RATE)
        quiet_cpu = meter.lap().total
        with _changes(bench, proxy) as made:
            changed = bench.paced(address, CHURN_RATE)
            changed_cpu = meter.lap().total
        if made[0] < CHANGES_A_SECOND * bench.effort.latency_seconds * 0.9:
            raise BenchError(f"{proxy.name}: only {made[0]} changes were made")
    errors = sum(quiet["errors"].values()) + sum(changed["errors"].values())
    return {
        "churn.quiet.p99": quiet["p99_us"],
        "churn.p99": changed["p99_us"],
        "churn.ratio": changed["p99_us"] / quiet["p99_us"],
        "churn.errors": errors,
        "churn.cpu": (changed_cpu - quiet_cpu) / made[0] * 1e6,
    }


@contextlib.contextmanager
def _changes(bench: Bench, proxy: Proxy) -> Iterator[list[int]]:
    """Change the endpoints of the web service a hundred times a second; at the end, see that changes are in force."""
    web = proxy.services[WEB.name]
    wishes = itertools.cycle(
        [
            HTTP_TARGETS[:2],
            HTTP_TARGETS,
            HTTP_TARGETS[1:],
            HTTP_TARGETS[2:],
            HTTP_TARGETS[::2],
            HTTP_TARGETS[:1],
        ]
    )
    stop = threading.Event()
    made = [0]
    problems: list[Exception] = []

    def run() -> None:
        begin = time.monotonic()
        try:
            while not stop.wait(max(0.0, begin + made[0] / CHANGES_A_SECOND - time.monotonic())):
                proxy.change(replace(web, targets=next(wishes)))
                made[0] += 1
        except Exception as error:  # noqa: BLE001 raised again where it is waited for
            problems.append(error)

    thread = threading.Thread(target=run, name="changes")
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join()
    if problems:
        raise problems[0]
    address = proxy.address(WEB.name)
    for number in (1, 3):
        proxy.change(replace(web, targets=HTTP_TARGETS[number - 1 : number]))
        wait_for(
            lambda number=number: all(ask(bench.lab.client, address) == number for _ in range(6)),
            f"{proxy.name}: a change is in force",
        )
