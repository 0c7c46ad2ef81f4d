"""The measurement of size: start, memory and one change with many listeners."""

from __future__ import annotations

import shutil
import statistics
import time

from bench.harness import HTTP_TARGETS, Bench
from bench.peers import Proxy, Service
from bench.pods import ask
from bench.processes import memory
from tests.support.waiting import wait_for

_LIMIT = 180.0  # seconds that a start or a change may take
_ASKED = 20  # listeners that have to answer, spread over all


def scale(bench: Bench, kind: type[Proxy]) -> dict[str, float]:
    """Every size in turn: seconds until all listeners serve, memory then, and milliseconds until one change is in force."""
    figures: dict[str, float] = {}
    for size in bench.effort.sizes:
        figures |= _of(bench, kind, size)
    return figures


def _of(bench: Bench, kind: type[Proxy], size: int) -> dict[str, float]:
    services = [Service(f"s{number}", number, 80, HTTP_TARGETS[:1]) for number in range(size)]
    proxy = bench.proxy(kind, *services)
    others = bench.lab.sockets(bench.lab.node)["inuse"]
    step = max(1, size // _ASKED)
    asked = [proxy.address(service.name) for service in (services[-1], *services[::step])]
    try:
        with proxy:
            for address in asked:
                wait_for(
                    lambda address=address: _answers(bench, proxy, address), f"{kind.name} serves", _LIMIT
                )
            wait_for(
                lambda: bench.lab.sockets(bench.lab.node)["inuse"] - others >= size,
                f"{kind.name} has {size} listeners",
                _LIMIT,
            )
            start = time.monotonic() - proxy.began
            time.sleep(bench.effort.warm)
            used = memory(proxy.pid)
            changed = statistics.median(
                _change(bench, proxy, services[size // 2]) for _ in range(bench.effort.changes)
            )
            proxy.check_alive()
    finally:
        shutil.rmtree(proxy.folder, ignore_errors=True)
    return {
        f"scale.{size}.start": start,
        f"scale.{size}.rss": used.resident / 1e6,
        f"scale.{size}.pss": used.proportional / 1e6,
        f"scale.{size}.change": changed * 1000,
    }


def _answers(bench: Bench, proxy: Proxy, address: tuple[str, int]) -> bool:
    proxy.check_alive()
    return ask(bench.lab.client, address, timeout=5) > 0


def _change(bench: Bench, proxy: Proxy, service: Service) -> float:
    """Move a service to the other pod; seconds until a new connection reaches it."""
    now = proxy.services[service.name].targets[0]
    number = 2 if now == HTTP_TARGETS[0] else 1
    moved = Service(service.name, service.number, service.port, HTTP_TARGETS[number - 1 : number])
    proxy.services[service.name] = moved
    put_in_force = proxy.reload(moved)
    address = proxy.address(service.name)
    begin = time.monotonic()
    put_in_force()
    wait_for(
        lambda: ask(bench.lab.client, address) == number,
        f"a change of {proxy.name} is in force",
        _LIMIT,
        pause=0.001,
    )
    taken = time.monotonic() - begin
    time.sleep(0.3)  # what a reload leaves to do must not slow the next one down
    return taken
