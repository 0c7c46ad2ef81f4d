"""Manifests that change while proxyd runs: every way of changing them, and mistakes in them."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.support.clients import Load, answers, ask, connect, many, read_line, refused
from tests.support.daemon import Proxyd
from tests.support.manifests import endpoints, mount, pod, service, text, write
from tests.support.netlab import Lab
from tests.support.waiting import DEADLINE, wait_for

VIP = "10.96.0.10"
OTHER_VIP = "10.96.0.20"

Run = Callable[..., Proxyd]


def in_force(lab: Lab, expected: str, what: str, vip: str = VIP) -> float:
    """Wait until `expected` answers at the VIP ("" for nobody); seconds it took, which are printed."""
    begin = time.monotonic()

    def reached() -> bool:
        try:
            # Where nobody holds the address the question is lost; the next one is asked soon.
            return ask(lab.client, vip, 80, timeout=0.5) == expected
        except OSError:
            return expected == ""

    # 200 ms is what proxyd promises; a busy machine that runs tests gets more.
    wait_for(reached, f"{what}: {expected or 'nobody'} answers")
    took = time.monotonic() - begin
    print(f"{what}: in force after {took * 1000:.0f} ms")
    return took


def test_every_way_of_changing_a_file(lab: Lab, manifests: Path, proxyd: Run) -> None:
    path = manifests / "web.yaml"
    write(manifests / "other.yaml", service("other", OTHER_VIP), endpoints("other", 3))
    write(path, service("web", VIP), endpoints("web", 1))
    daemon = proxyd()
    daemon.wait_listener(VIP, 80)
    daemon.wait_listener(OTHER_VIP, 80)
    with connect(lab.client, OTHER_VIP, 80) as kept, Load(lab.client, OTHER_VIP, 80, clients=1) as load:
        kept.sendall(b"echo\nbefore\n")
        assert read_line(kept) == "before"
        in_force(lab, "pod-1", "at the start")
        path.write_text(text(service("web", VIP), endpoints("web", 2)))
        in_force(lab, "pod-2", "written in place")
        write(path, service("web", VIP), endpoints("web", 1))
        in_force(lab, "pod-1", "renamed over")
        path.unlink()
        in_force(lab, "", "deleted")
        write(manifests / "new.yml", service("web", VIP), endpoints("web", 2))
        in_force(lab, "pod-2", "a new file")
        (manifests / "new.yml").rename(manifests / "moved.json")
        # JSON is not YAML in general, but this YAML has a document marker: it is no longer valid.
        wait_for(lambda: "moved.json" in daemon.log(), "a message about it")
        (manifests / "moved.json").unlink()
        in_force(lab, "", "deleted again")
        write(
            manifests / "list.yaml",
            {"apiVersion": "v1", "kind": "List", "items": [service("web", VIP), endpoints("web", 1)]},
        )
        in_force(lab, "pod-1", "a List")
        # A file that is no manifest, an editor's backup and a swap file are not read.
        for name in ("notes.txt", "list.yaml~", ".list.yaml.swp"):
            (manifests / name).write_text(text(endpoints("web", 2)))
        kept.sendall(b"after\n")
        assert read_line(kept) == "after"
        assert many(lab.client, VIP, 80, 10).answered == {"pod-1": 10}
    assert (load.outcome.refused, load.outcome.broken) == ([], [])
    assert set(load.outcome.answered) == {"pod-3"}


def test_a_single_file(lab: Lab, folder: Path, manifests: Path) -> None:
    path = write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    more = write(manifests / "other.yaml", service("other", OTHER_VIP), endpoints("other", 3))
    with Proxyd(lab.node, folder, path, more) as daemon:
        daemon.wait_listener(VIP, 80)
        write(manifests / "unrelated.yaml", endpoints("web", 3))
        write(path, service("web", VIP), endpoints("web", 2))
        in_force(lab, "pod-2", "renamed over")
        path.write_text(text(service("web", VIP), endpoints("web", 1)))
        in_force(lab, "pod-1", "written in place")
        path.unlink()
        # What the operator named stays in force while it is missing, and the log says so.
        wait_for(lambda: f"{path}" in daemon.log(), "a message about the missing file")
        assert many(lab.client, VIP, 80, 5).answered == {"pod-1": 5}
        write(path, service("web", VIP), endpoints("web", 2))
        in_force(lab, "pod-2", "there again")
        assert ask(lab.client, OTHER_VIP, 80) == "pod-3"


def test_a_mounted_config_map(lab: Lab, folder: Path) -> None:
    mounted = folder / "mounted"
    mount(mounted, {"web.yaml": text(service("web", VIP), endpoints("web", 1))})
    with Proxyd(lab.node, folder, mounted) as daemon:
        daemon.wait_listener(VIP, 80)
        for number in (2, 1, 3):
            mount(mounted, {"web.yaml": text(service("web", VIP), endpoints("web", number))})
            in_force(lab, f"pod-{number}", "..data swapped")
        mount(mounted, {"web.yaml": text(service("web", VIP)), "endpoints.yaml": text(endpoints("web", 2))})
        in_force(lab, "pod-2", "a file more")
        mount(mounted, {"web.yaml": text(service("web", VIP))})
        in_force(lab, "", "a file less")
        # The files under `..version` are the same objects: they are not read twice.
        assert len(daemon.get("services")) == 1


def test_a_folder_that_is_made_again(lab: Lab, folder: Path, manifests: Path) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    with Proxyd(lab.node, folder, manifests) as daemon:
        daemon.wait_listener(VIP, 80)
        shutil.rmtree(manifests)
        wait_for(lambda: f"{manifests}" in daemon.log(), "a message about the missing folder")
        beside = folder / "beside"
        beside.mkdir()
        write(beside / "web.yaml", service("web", VIP), endpoints("web", 2))
        beside.rename(manifests)
        wait_for(lambda: answers_as(lab, "pod-2"), "the folder to be read again")
        write(manifests / "web.yaml", service("web", VIP), endpoints("web", 3))
        in_force(lab, "pod-3", "renamed over, in the new folder")


def answers_as(lab: Lab, name: str) -> bool:
    """Whether this pod answers at the VIP now."""
    try:
        return ask(lab.client, VIP, 80, timeout=0.5) == name
    except OSError:
        return False


def test_pods_come_and_go(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, selector={"app": "MyApp"}))
    daemon = proxyd()
    daemon.wait_listener(VIP, 80, "NoEndpoints")
    write(manifests / "pods.yaml", pod(1), pod(2, ready=False), pod(3, app="Other"))
    in_force(lab, "pod-1", "a ready Pod")
    assert many(lab.client, VIP, 80, 5).answered == {"pod-1": 5}
    write(manifests / "pods.yaml", pod(1, ready=False), pod(2), pod(3, app="Other"))
    in_force(lab, "pod-2", "another is ready")
    write(manifests / "pods.yaml", pod(1, ready=False), pod(2, ready=False), pod(3))
    in_force(lab, "pod-3", "a label changed")
    (manifests / "pods.yaml").unlink()
    in_force(lab, "", "no Pods")


def test_pods_that_are_not_ready_where_that_is_wanted(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, selector={"app": "MyApp"}))
    write(manifests / "pods.yaml", pod(1, ready=False), pod(2, ready=False, app="Other"))
    daemon = proxyd()
    daemon.wait_listener(VIP, 80, "NoEndpoints")
    assert refused(lab.client, VIP, 80)
    publishing = service("web", VIP, selector={"app": "MyApp"}, publishNotReadyAddresses=True)
    write(manifests / "web.yaml", publishing)
    in_force(lab, "pod-1", "what is not ready")
    assert many(lab.client, VIP, 80, 5).answered == {"pod-1": 5}
    failed = pod(1, ready=False)
    failed["status"]["phase"] = "Failed"
    write(manifests / "pods.yaml", failed, pod(2, ready=False, app="Other"))
    daemon.wait_listener(VIP, 80, "NoEndpoints")
    write(manifests / "pods.yaml", pod(1, ready=False))
    in_force(lab, "pod-1", "a Pod that runs again")
    write(manifests / "web.yaml", service("web", VIP, selector={"app": "MyApp"}))
    daemon.wait_listener(VIP, 80, "NoEndpoints")
    assert refused(lab.client, VIP, 80)


def test_a_port_that_changes(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = proxyd()
    daemon.wait_listener(VIP, 80)
    write(manifests / "web.yaml", service("web", VIP, port=81), endpoints("web", 1))
    daemon.wait_listener(VIP, 81)
    assert ask(lab.client, VIP, 81) == "pod-1"
    assert refused(lab.client, VIP, 80)
    write(manifests / "web.yaml", service("web", OTHER_VIP, port=81), endpoints("web", 1))
    daemon.wait_listener(OTHER_VIP, 81)
    assert ask(lab.client, OTHER_VIP, 81) == "pod-1"
    assert not answers(lab.client, VIP, 81, timeout=0.5)


BAD_SERVICE = """\
apiVersion: v1
kind: Service
metadata:
  name: bad
spec:
  clusterIP: 10.96.0.30
  ports:
    - port: eighty
"""


def test_a_bad_object_beside_good_ones(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(
        manifests / "web.yaml",
        service("web", VIP),
        f"---\n{BAD_SERVICE}",
        endpoints("web", 1),
        service("other", OTHER_VIP),
        endpoints("other", 2),
    )
    daemon = proxyd()
    daemon.wait_listener(VIP, 80)
    daemon.wait_listener(OTHER_VIP, 80)
    assert ask(lab.client, VIP, 80) == "pod-1"
    assert ask(lab.client, OTHER_VIP, 80) == "pod-2"
    assert {(each.ip, each.port) for each in daemon.listeners()} == {(VIP, 80), (OTHER_VIP, 80)}
    log = daemon.log()
    assert "spec.ports[0].port" in log
    assert "web.yaml" in log
    assert "Traceback" not in log
    # Mended, it works.
    write(manifests / "mended.yaml", service("bad", "10.96.0.30"), endpoints("bad", 3))
    in_force(lab, "pod-3", "the mended object", "10.96.0.30")


def test_a_bad_edit_leaves_the_earlier_version_in_force(lab: Lab, manifests: Path, proxyd: Run) -> None:
    path = manifests / "web.yaml"
    write(path, service("web", VIP), endpoints("web", 1), service("other", OTHER_VIP), endpoints("other", 2))
    daemon = proxyd()
    daemon.wait_listener(VIP, 80)
    bad = BAD_SERVICE.replace("bad", "web").replace("10.96.0.30", VIP)
    # The same file brings a good change too, which shows that the edit has been read.
    write(path, bad, endpoints("web", 1), service("other", OTHER_VIP), endpoints("other", 3))
    in_force(lab, "pod-3", "the good part", OTHER_VIP)
    wait_for(lambda: "spec.ports[0].port" in daemon.log(), "a message about the bad part")
    with Load(lab.client, VIP, 80, clients=1) as load:
        load.wait_more(20)
        # A file that cannot be read at all changes nothing either.
        write(path, "kind: Service\n  metadata: [\n")
        wait_for(lambda: daemon.log().count("web.yaml") >= 2, "a message about the file")
        load.wait_more(20)
    assert load.outcome.answered.keys() == {"pod-1"}
    assert (load.outcome.refused, load.outcome.broken) == ([], [])
    assert ask(lab.client, OTHER_VIP, 80) == "pod-3"
    write(path, service("web", VIP), endpoints("web", 2))
    in_force(lab, "pod-2", "a good edit")
    in_force(lab, "", "what it no longer has", OTHER_VIP)


WATCHER = """
import asyncio, sys
from proxyd.sources.manifests.watch import watch

async def main():
    stream = watch(sys.argv[1:], warn=lambda text: print("warn", text, flush=True), poll_seconds=0.2)
    async for _ in stream:
        print("changed", flush=True)

asyncio.run(main())
"""


@pytest.fixture
async def starved(folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[asyncio.subprocess.Process]:
    """`watch` over `folder` in a user namespace that has no inotify left of the named kind."""
    limit = f"/proc/sys/user/{request.param}"
    script = f'echo 0 > {limit}; exec "$@"'
    process = await asyncio.create_subprocess_exec(
        *("unshare", "-Ur", "sh", "-c", script, "sh", sys.executable, "-c", WATCHER, str(folder)),
        stdout=subprocess.PIPE,
    )
    yield process
    process.kill()
    await process.communicate()


@pytest.mark.parametrize("starved", ["max_inotify_instances", "max_inotify_watches"], indirect=True)
async def test_without_inotify_it_compares_stamps(starved: asyncio.subprocess.Process, folder: Path) -> None:
    assert starved.stdout is not None

    async def line() -> str:
        assert starved.stdout is not None
        return (await asyncio.wait_for(starved.stdout.readline(), DEADLINE)).decode().strip()

    assert (
        await line()
        == "warn manifests: no more inotify watches or instances: looking for changes every 0.2 s instead; "
        "raise fs.inotify.max_user_watches and fs.inotify.max_user_instances"
    )
    assert await line() == "changed"
    for n in range(3):
        (folder / "a.yaml").write_text(f"a: {n}\n")
        assert await line() == "changed"
