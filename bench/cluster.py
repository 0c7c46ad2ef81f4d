"""The API source against the test API server: a first list, a relist, single changes, a storm of changes.

    python bench/cluster.py [--services 10000] [--endpoints 30000] [--rate 1000] [--seconds 5]

The server is a process of its own. Memory is what this process grew by; seconds are from the start to `synced`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import ipaddress
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import uvloop

from proxyd.api.meta import ObjectName
from proxyd.sources.cluster import ClusterSource, ClusterState, load_access

SERVER = Path(__file__).parent.parent / "tests" / "cluster" / "apiserver.py"


def rss() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Seen:
    """States as they come in, and whoever waits for one."""

    def __init__(self) -> None:
        self.state = ClusterState()
        self.calls = 0
        self.event = asyncio.Event()

    def __call__(self, state: ClusterState) -> None:
        self.state = state
        self.calls += 1
        self.event.set()


@contextlib.asynccontextmanager
async def served(services: int, endpoints: int) -> AsyncIterator[str]:
    arguments = ["--services", str(services), "--endpoints", str(endpoints)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SERVER), *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().split()[1]
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


async def change(session: aiohttp.ClientSession, url: str, i: int, ip: str) -> None:
    path = f"/apis/discovery.k8s.io/v1/namespaces/ns-{i % 50}/endpointslices/bulk-{i}-abcde"
    patch = {"endpoints": [{"addresses": [ip], "conditions": {"ready": True}}]}
    async with session.patch(
        url + path, data=json.dumps(patch), headers={"Content-Type": "application/merge-patch+json"}
    ) as response:
        response.raise_for_status()


async def measure(args: argparse.Namespace) -> None:
    async with served(args.services, args.endpoints) as url:
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write(
                f'{{"clusters":[{{"name":"a","cluster":{{"server":"{url}"}}}}],"contexts":'
                '[{"name":"a","context":{"cluster":"a"}}],"current-context":"a"}'
            )
            file.flush()
            access = load_access(file.name)
        async with aiohttp.ClientSession() as session:
            await run(args, session, url, access)


async def run(args: argparse.Namespace, session: aiohttp.ClientSession, url: str, access: object) -> None:
    seen = Seen()
    source = ClusterSource(
        access,  # type: ignore[arg-type]  # an Access
        node_name="node",
        on_change=seen,
        on_problem=lambda problem: print("problem:", problem),
        on_solved=lambda text: print("solved:", text),
    )
    gc.collect()
    before, cpu, started = rss(), time.process_time(), time.perf_counter()
    task = asyncio.ensure_future(source.run())
    await seen.event.wait()
    seconds = time.perf_counter() - started
    endpoints = sum(len(one.endpoints) for made in seen.state.slices.values() for one in made)
    print(
        f"listed {len(seen.state.services)} services, {endpoints} endpoints: {seconds:.2f} s,"
        f" CPU {time.process_time() - cpu:.2f} s, {rss() - before:.0f} MB (process {rss():.0f} MB)"
    )

    latencies = []
    for n in range(200):
        await asyncio.sleep(0.02)  # longer than the pause between two reports
        i, ip = n * 37 % args.services, f"10.200.0.{n % 250 + 1}"
        name = ObjectName(f"ns-{i % 50}", f"bulk-{i}")
        seen.event.clear()
        started = time.perf_counter()
        await change(session, url, i, ip)
        while seen.state.slices[name][0].endpoints[0].addresses[0] != ip:
            await seen.event.wait()
            seen.event.clear()
        latencies.append((time.perf_counter() - started) * 1000)
    latencies.sort()
    print(
        f"one change, from sending the PATCH: median {statistics.median(latencies):.1f} ms, p99 {latencies[-2]:.1f} ms"
    )

    await storm(args, session, url, seen)

    state, calls, lists = seen.state, seen.calls, source.lists
    started, cpu = time.perf_counter(), time.process_time()
    asked = sum(source.stats.requests.values())
    for operation in ("compact", "restart"):
        async with session.post(f"{url}/_test/{operation}", json={}) as response:
            response.raise_for_status()
    while source.lists < lists + 3:  # noqa: ASYNC110  that nothing changes is what is measured: no event tells
        await asyncio.sleep(0.02)
    print(
        f"relist after 410: {time.perf_counter() - started:.2f} s, CPU {time.process_time() - cpu:.2f} s,"
        f" {sum(source.stats.requests.values()) - asked} requests, {seen.calls - calls} calls,"
        f" same objects: {seen.state is state} (process {rss():.0f} MB)"
    )
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def storm(args: argparse.Namespace, session: aiohttp.ClientSession, url: str, seen: Seen) -> None:
    """Changes that the server makes to its own objects."""
    calls, cpu, started = seen.calls, time.process_time(), time.perf_counter()
    total = args.rate * args.seconds
    order = {"rate": args.rate, "seconds": args.seconds, "services": args.services}
    async with session.post(f"{url}/_test/storm", json=order) as response:
        response.raise_for_status()
    written = time.perf_counter() - started
    i, last = (total - 1) % args.services, str(ipaddress.ip_address(0x0AC90000 + total - 1))
    name = ObjectName(f"ns-{i % 50}", f"bulk-{i}")
    while seen.state.slices[name][0].endpoints[0].addresses[0] != last:
        seen.event.clear()
        await seen.event.wait()
    behind = time.perf_counter() - started - written
    print(
        f"{total} changes in {written:.2f} s ({total / written:.0f}/s): the last one seen {behind * 1000:.0f} ms after it was"
        f" made, {seen.calls - calls} calls, CPU {time.process_time() - cpu:.2f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--services", type=int, default=10000)
    parser.add_argument("--endpoints", type=int, default=30000)
    parser.add_argument("--rate", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=5)
    uvloop.run(measure(parser.parse_args()))
