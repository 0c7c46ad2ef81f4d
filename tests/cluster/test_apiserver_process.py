"""The test API server as a process of its own, and kubectl against it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from tests.support.cluster_source import Follower, name_of
from tests.support.paths import REPOSITORY
from tests.support.waiting import eventually

KUBECTL = shutil.which("kubectl")


@contextlib.asynccontextmanager
async def process(folder: Path, *arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The running server, its kubeconfig written, and its URL."""
    files = ["--kubeconfig", str(folder / "kubeconfig"), "--state", str(folder / "state")]
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.api_server", *files, *arguments),
        stdout=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert running.stdout is not None
    try:
        async with asyncio.timeout(60):
            ready = (await running.stdout.readline()).decode()
        yield running, ready.split()[1]
    finally:
        if running.returncode is None:
            running.send_signal(signal.SIGTERM)
        await running.wait()


@contextlib.asynccontextmanager
async def followed(folder: Path) -> AsyncIterator[Follower]:
    seen = Follower(folder / "kubeconfig", node_name="")
    task = asyncio.ensure_future(seen.source.run())
    try:
        await seen.sync()
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_it_was_told_survives_a_kill(tmp_path: Path) -> None:
    async with (
        process(tmp_path, "--services", "20", "--endpoints", "60") as (server, url),
        followed(tmp_path) as seen,
    ):
        assert len(seen.state.services) == 20
        assert sum(len(one.endpoints) for made in seen.state.slices.values() for one in made) == 60
        first = seen.state
        async with aiohttp.ClientSession() as session:
            for operation in ("compact", "cut"):
                async with session.post(f"{url}/_test/{operation}", json={}) as answer:
                    assert answer.status == 200
            await eventually(lambda: seen.source.lists == 4)
            async with session.post(
                f"{url}/_test/bulk", json={"services": 5, "endpoints": 5, "prefix": "more"}
            ) as answer:
                assert answer.status == 200
        await eventually(lambda: len(seen.state.services) == 25)
        server.kill()
        await server.wait()
        port = url.rpartition(":")[2]
        async with process(tmp_path, "--port", port):
            await eventually(lambda: seen.solved or not seen.source.problems)
            await eventually(lambda: seen.source.lists == 4 and not seen.source.problems)
            assert len(seen.state.services) == 25
            name = name_of("ns-0/bulk-0")
            assert seen.state.services[name] is first.services[name]


async def kubectl(folder: Path, *arguments: str, given: object = None) -> str:
    assert KUBECTL is not None
    running = await asyncio.create_subprocess_exec(
        KUBECTL,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "KUBECONFIG": str(folder / "kubeconfig"), "HOME": str(folder)},
    )
    async with asyncio.timeout(40):
        output, _ = await running.communicate(json.dumps(given).encode() if given is not None else None)
    assert running.returncode == 0, output.decode()
    return output.decode()


if KUBECTL is not None:  # where it is installed

    async def test_kubectl(tmp_path: Path) -> None:
        async with process(tmp_path), followed(tmp_path) as seen:
            ports = [{"name": "http", "port": 80}]
            body = {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "web"},
                "spec": {"ports": ports},
            }
            await kubectl(tmp_path, "create", "--validate=false", "-f", "-", given=body)
            await eventually(lambda: seen.services() == {"default/web"})
            slice_ = {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": 8080}],
                "endpoints": [{"addresses": ["10.1.0.1"]}],
            }
            await kubectl(tmp_path, "create", "--validate=false", "-f", "-", given=slice_)
            await eventually(lambda: seen.endpoints("web") == {"10.1.0.1"})
            patch = json.dumps({"spec": {"sessionAffinity": "ClientIP"}})
            await kubectl(tmp_path, "patch", "service", "web", "--type=merge", "-p", patch)
            await eventually(
                lambda: seen.state.services[name_of("default/web")].spec.affinity_seconds == 10800
            )
            await kubectl(
                tmp_path, "label", "service", "web", "service.kubernetes.io/service-proxy-name=other"
            )
            await eventually(lambda: not seen.services())
            await kubectl(tmp_path, "label", "service", "web", "service.kubernetes.io/service-proxy-name-")
            await eventually(lambda: seen.services() == {"default/web"})
            assert "web" in await kubectl(tmp_path, "get", "services", "-A", "-o", "name")
            await kubectl(tmp_path, "delete", "service", "web")
            await eventually(lambda: not seen.services())
