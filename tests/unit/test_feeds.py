"""What the feeds hand on: real files and inotify, a real API server on loopback, and every snapshot in order."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxyd.api.meta import ObjectName
from proxyd.control.config.settings import Settings
from proxyd.control.feeds.joined import JoinedFeed
from proxyd.state.snapshot import Snapshot
from tests.support.api_server import ApiServer, kubeconfig
from tests.support.cluster_source import endpoints
from tests.support.waiting import eventually

MANIFEST = """\
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{ports: [{{name: http, port: {port}}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}}}
addressType: IPv4
ports: [{{name: http, port: 8080}}]
endpoints: [{{addresses: [10.1.0.1]}}]
"""


def cluster_service(name: str, port: int = 80, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"ports": [{"name": "http", "port": port}], **spec}}


class Fed:
    """A feed of everything that the settings name, and each snapshot that it handed on."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.snapshots: list[Snapshot] = []
        manifests = {"manifests": (str(folder),)} if folder.is_dir() else {}
        self.feed = JoinedFeed(
            Settings(
                **manifests,
                **settings,
                service_cluster_ip_range=("10.96.0.0/24",),
                state_file=str(folder.with_name("state.json")),
            ),
            self.snapshots.append,
        )

    def write(self, name: str, port: int) -> None:
        """One Service, and an endpoint, in a file of its name."""
        self.replace(name, MANIFEST.format(name=name, port=port))

    def replace(self, name: str, text: str) -> None:
        """Puts the whole file there at once: half of a change is never seen."""
        new = self.folder / f".{name}.new"
        new.write_text(text)
        new.rename(self.folder / f"{name}.yaml")

    def ports(self) -> dict[str, int]:
        """The port of each Service in the last snapshot."""
        return ports(self.snapshots[-1]) if self.snapshots else {}

    def history(self) -> list[dict[str, int]]:
        """The same, of every snapshot."""
        return [ports(snapshot) for snapshot in self.snapshots]

    def ip(self, name: str) -> str:
        return self.snapshots[-1].services[ObjectName("default", name)].spec.cluster_ip

    async def handed_on(self, **wanted: int) -> None:
        """Waits until the last snapshot has these Services, and no others."""
        await eventually(lambda: self.ports() == wanted, f"the Services {wanted}")

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """The feed follows its sources, and inotify watches the folder if there is one."""
        task = asyncio.ensure_future(self.feed.follow())
        try:
            if self.folder.is_dir():
                await eventually(lambda: watches(self.folder), "inotify to watch the folder")
            yield
            assert not task.done(), task.exception()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def ports(snapshot: Snapshot) -> dict[str, int]:
    return {name.name: service.spec.ports[0].port for name, service in sorted(snapshot.services.items())}


def watches(folder: Path) -> bool:
    """Whether an inotify instance of this process watches a folder (proc(5), fdinfo)."""
    inode = f"ino:{folder.stat().st_ino:x} "
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)  # noqa: PTH115  it is no path
            if "inotify" in target and inode in Path("/proc/self/fdinfo", link.name).read_text():
                return True
        except OSError:
            continue  # it was closed meanwhile
    return False


@pytest.fixture(autouse=True)
def objects_stay_collectable() -> Iterator[None]:
    """What a feed reads first is never searched for garbage again; other tests count on that search."""
    yield
    gc.unfreeze()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "manifests"
    path.mkdir()
    return path


class TestManifests:
    async def test_the_first_reading_hands_on_everything_at_once(self, folder: Path) -> None:
        fed = Fed(folder)
        for name, port in (("a", 1), ("b", 2), ("c", 3)):
            fed.write(name, port)
        assert not fed.feed.synced
        assert fed.feed.first() == ()
        assert fed.history() == [{"a": 1, "b": 2, "c": 3}]
        assert fed.feed.synced
        assert fed.feed.files == 3

    async def test_each_change_is_handed_on_once(self, folder: Path) -> None:
        fed = Fed(folder)
        fed.write("a", 1)
        fed.write("b", 2)
        fed.feed.first()
        async with fed.following():
            fed.write("a", 10)
            await fed.handed_on(a=10, b=2)
            fed.write("c", 3)
            await fed.handed_on(a=10, b=2, c=3)
            (folder / "b.yaml").unlink()
            await fed.handed_on(a=10, c=3)
            fed.write("c", 30)
            await fed.handed_on(a=10, c=30)
        assert fed.history() == [
            {"a": 1, "b": 2},
            {"a": 10, "b": 2},
            {"a": 10, "b": 2, "c": 3},
            {"a": 10, "c": 3},
            {"a": 10, "c": 30},
        ]

    async def test_what_says_the_same_is_not_handed_on(self, folder: Path) -> None:
        fed = Fed(folder)
        fed.write("a", 1)
        fed.write("b", 2)
        fed.feed.first()
        async with fed.following():
            fed.write("a", 1)
            os.utime(folder / "b.yaml", ns=(1, 1))
            fed.replace("b", "# a comment\n" + (folder / "b.yaml").read_text())
            await fed.feed.rescan()
            # Whatever was to come of these has come when the next change has.
            fed.write("b", 20)
            await fed.handed_on(a=1, b=20)
        assert fed.history() == [{"a": 1, "b": 2}, {"a": 1, "b": 20}]

    async def test_what_did_not_change_is_the_same_object(self, folder: Path) -> None:
        fed = Fed(folder)
        fed.write("a", 1)
        fed.write("b", 2)
        fed.feed.first()
        async with fed.following():
            fed.write("b", 20)
            await fed.handed_on(a=1, b=20)
        name = ObjectName("default", "a")
        assert fed.snapshots[0].services[name] is fed.snapshots[1].services[name]

    @pytest.mark.parametrize("wrong", ["kind: [unclosed\n", MANIFEST.format(name="a", port="eighty")])
    async def test_a_wrong_file_keeps_its_earlier_objects(self, folder: Path, wrong: str) -> None:
        fed = Fed(folder)
        fed.write("a", 1)
        fed.write("b", 2)
        fed.feed.first()
        async with fed.following():
            fed.replace("a", wrong)
            await eventually(lambda: fed.feed.problems, "a problem")
            assert all(problem.file == str(folder / "a.yaml") for problem in fed.feed.problems)
            assert fed.ports() == {"a": 1, "b": 2}
            # The other files are followed as before.
            fed.write("b", 20)
            await fed.handed_on(a=1, b=20)
            fed.write("a", 10)
            await fed.handed_on(a=10, b=20)
            assert fed.feed.problems == ()

    def test_a_path_that_does_not_exist_is_missing(self, folder: Path) -> None:
        fed = Fed(folder)
        folder.rmdir()
        (problem,) = fed.feed.first()
        assert problem.message == "no such file or folder"
        assert fed.feed.missing == (str(folder),)


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with ApiServer() as running:
        yield running


class TestCluster:
    async def test_nothing_is_handed_on_before_everything_is_listed(
        self, server: ApiServer, tmp_path: Path
    ) -> None:
        server.store.create("services", cluster_service("web"))
        server.store.create("endpointslices", endpoints("web", "10.1.0.1"))
        hung = server.fail("endpointslices", hang=True)
        fed = Fed(tmp_path / "none", kubeconfig=write_kubeconfig(server, tmp_path))
        assert fed.feed.first() == ()
        async with fed.following():
            await eventually(lambda: hung.answered and any("/services" in one for one in server.requests))
            assert not fed.feed.synced
            assert fed.snapshots == []
            # The connection of the question that nobody answered is cut, and the next one is answered.
            await server.restart()
            await fed.handed_on(web=80)
            assert fed.feed.synced
        assert len(fed.snapshots) == 1
        (slices,) = fed.snapshots[0].slices.values()
        assert slices[0].endpoints[0].addresses == ("10.1.0.1",)

    async def test_each_change_is_handed_on_once(self, server: ApiServer, tmp_path: Path) -> None:
        server.store.create("services", cluster_service("web"))
        fed = Fed(tmp_path / "none", kubeconfig=write_kubeconfig(server, tmp_path))
        async with fed.following():
            await fed.handed_on(web=80)
            server.store.create("services", cluster_service("db", 5432))
            await fed.handed_on(web=80, db=5432)
            server.store.delete("services", ("default", "web"))
            await fed.handed_on(db=5432)
        assert fed.history() == [{"web": 80}, {"db": 5432, "web": 80}, {"db": 5432}]


class TestBoth:
    async def test_nothing_is_handed_on_before_both_are_known(
        self, server: ApiServer, folder: Path, tmp_path: Path
    ) -> None:
        server.store.create("services", cluster_service("web"))
        await server.stop()
        fed = Fed(folder, kubeconfig=write_kubeconfig(server, tmp_path))
        fed.write("a", 1)
        fed.feed.first()
        async with fed.following():
            fed.write("a", 10)
            await eventually(lambda: fed.feed.problems, "a problem with the server")
            assert fed.snapshots == []
            assert not fed.feed.synced
            await server.start()
            await fed.handed_on(a=10, web=80)
        # The first snapshot has the Services of both, and the manifest as it was then.
        assert fed.history() == [{"a": 10, "web": 80}]

    async def test_a_change_of_either_is_handed_on_once(
        self, server: ApiServer, folder: Path, tmp_path: Path
    ) -> None:
        server.store.create("services", cluster_service("web"))
        fed = Fed(folder, kubeconfig=write_kubeconfig(server, tmp_path))
        fed.write("a", 1)
        fed.feed.first()
        async with fed.following():
            await fed.handed_on(a=1, web=80)
            fed.write("a", 10)
            await fed.handed_on(a=10, web=80)
            server.store.patch("services", ("default", "web"), cluster_service("web", 81))
            await fed.handed_on(a=10, web=81)
        assert fed.history() == [{"a": 1, "web": 80}, {"a": 10, "web": 80}, {"a": 10, "web": 81}]

    async def test_of_one_name_the_clusters_service_is_served_as_long_as_it_exists(
        self, server: ApiServer, folder: Path, tmp_path: Path
    ) -> None:
        fed = Fed(folder, kubeconfig=write_kubeconfig(server, tmp_path))
        fed.write("web", 8080)
        fed.feed.first()
        async with fed.following():
            await fed.handed_on(web=8080)
            server.store.create("services", cluster_service("web"))
            await fed.handed_on(web=80)
            (problem,) = fed.feed.manifest_problems
            assert problem.message.startswith("the cluster has a Service of this name, which is served")
            server.store.delete("services", ("default", "web"))
            await fed.handed_on(web=8080)
            assert fed.feed.manifest_problems == ()

    async def test_a_manifest_never_keeps_an_address_that_the_cluster_gives(
        self, server: ApiServer, folder: Path, tmp_path: Path
    ) -> None:
        fed = Fed(folder, kubeconfig=write_kubeconfig(server, tmp_path))
        fed.write("a", 1)
        fed.feed.first()
        async with fed.following():
            await fed.handed_on(a=1)
            first = fed.ip("a")
            server.store.create("services", cluster_service("web", clusterIP=first))
            await eventually(lambda: "web" in fed.ports() and fed.ip("a") != first, "another address")
            assert fed.ip("web") == first


def write_kubeconfig(server: ApiServer, folder: Path) -> str:
    path = folder / "kubeconfig"
    path.write_text(kubeconfig(server.url))
    return str(path)
