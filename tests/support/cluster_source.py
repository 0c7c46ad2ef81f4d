"""A ClusterSource under test, and everything it said."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from proxyd.api.meta import ObjectName
from proxyd.api.problems import Problem
from proxyd.sources.cluster import ClusterSource, ClusterState, Tuning, load_access
from tests.support.api_server import ApiServer, kubeconfig
from tests.support.api_store import slice_body
from tests.support.paths import REPOSITORY
from tests.support.waiting import DEADLINE, eventually

RECORDINGS = REPOSITORY / "tests" / "cluster" / "recordings"
QUICK = Tuning(
    watch_seconds=(20, 20), slack_seconds=1, steady_seconds=0.1, first_pause=0.05, longest_pause=0.4
)


def recorded(name: str) -> Any:
    """The JSON body of a recorded answer."""
    return json.loads((RECORDINGS / name).read_text().split("\n\n", 1)[1])


def recorded_lines(name: str) -> list[bytes]:
    return (RECORDINGS / name).read_bytes().splitlines(keepends=True)


def name_of(text: str) -> ObjectName:
    return ObjectName(*text.split("/"))


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"ports": [{"name": "http", "port": 80}], **spec}}


def endpoints(name: str, *ips: str) -> dict[str, Any]:
    return slice_body("default", name, ips)


class Follower:
    """A source that runs, with what it reported."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.states: list[ClusterState] = []
        self.problems: list[Problem] = []
        self.solved: list[str] = []
        self.source = ClusterSource(
            load_access(str(path)),
            kubeconfig=str(path),
            **{"node_name": "node", "tuning": QUICK, "qps": 0, **options},
            on_change=self.states.append,
            on_problem=self.problems.append,
            on_solved=self.solved.append,
        )

    @property
    def state(self) -> ClusterState:
        return self.states[-1] if self.states else ClusterState()

    def services(self) -> set[str]:
        return {str(name) for name in self.state.services}

    def endpoints(self, name: str) -> set[str]:
        slices = self.state.slices.get(name_of(f"default/{name}"), ())
        return {endpoint.addresses[0] for one in slices for endpoint in one.endpoints}

    def said(self, text: str) -> int:
        return sum(text in str(problem) for problem in self.problems)

    async def settled(self) -> None:
        """All watches are open, and have been for so long that a cut of one is nothing to speak of."""
        watchers = self.source._watchers
        await eventually(lambda: not any(watcher._backoff.failures for watcher in watchers))

    async def sync(self) -> None:
        await eventually(lambda: self.states)


@asynccontextmanager
async def follow(
    server: ApiServer,
    folder: Path,
    *,
    user: dict[str, Any] | None = None,
    cluster: dict[str, Any] | None = None,
    sync: bool = True,
    **options: Any,
) -> AsyncIterator[Follower]:
    """A source that follows a server; synced, if it is not said otherwise."""
    path = folder / "kubeconfig"
    path.write_text(kubeconfig(server.url, user=user, cluster=cluster))
    follower = Follower(path, **options)
    task = asyncio.ensure_future(follower.source.run())
    try:
        if sync:
            await follower.sync()
        yield follower
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=DEADLINE)


def make_ca(folder: Path, name: str = "ca") -> None:
    key = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    openssl(folder, *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt")


def make_certificate(folder: Path, name: str, *, ca: str = "ca", names: str = "IP:127.0.0.1") -> None:
    """NAME.crt and NAME.key for a server or a client, with NAME as its common name."""
    key = [
        "req",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-subj",
        f"/CN={name}",
    ]
    openssl(folder, *key, "-keyout", f"{name}.key", "-out", f"{name}.csr")
    (folder / f"{name}.ext").write_text(f"subjectAltName={names}\n")
    sign = [
        "x509",
        "-req",
        "-in",
        f"{name}.csr",
        "-CA",
        f"{ca}.crt",
        "-CAkey",
        f"{ca}.key",
        "-CAcreateserial",
    ]
    openssl(folder, *sign, "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.crt")
