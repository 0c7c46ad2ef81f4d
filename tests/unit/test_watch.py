"""Watching manifests: every way a file can change is noticed in time, and stopping is quick."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

from proxyd.sources.manifests.watch import watch

# What the operator is promised, from the edit to its effect, is 200 ms; the machine may be busy.
AT_ONCE = 20.0  # a busy machine may take its time, and it is well before the safety scan
SAFETY = 60.0  # so long that no test passes by it


class Watching:
    """Counts what `watch` reports."""

    def __init__(self, *paths: Path | str, **options: float) -> None:
        self.warnings: list[str] = []
        self._stream = watch([str(path) for path in paths], warn=self.warnings.append, **options)
        self._reported = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.count = 0

    async def __aenter__(self) -> Self:
        self._task = asyncio.get_running_loop().create_task(self._follow())
        await asyncio.wait_for(self._reported.wait(), AT_ONCE)
        await self.quiet()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _follow(self) -> None:
        async with contextlib.aclosing(self._stream) as stream:
            async for _ in stream:
                self.count += 1
                self._reported.set()

    async def quiet(self, seconds: float = 0.15) -> None:
        """Waits until nothing was reported for so long."""
        deadline = time.monotonic() + AT_ONCE
        while True:
            self._reported.clear()
            try:
                await asyncio.wait_for(self._reported.wait(), seconds)
            except TimeoutError:
                return
            assert time.monotonic() < deadline

    async def notices(self, change: Callable[[], object], within: float = 2 * AT_ONCE) -> float:
        """Makes a change; returns after how many seconds it was reported."""
        await self.quiet()
        began = time.monotonic()
        change()
        await asyncio.wait_for(self._reported.wait(), within)
        return time.monotonic() - began

    async def ignores(self, change: Callable[[], object]) -> None:
        await self.quiet(0.5)  # whatever is left to be said of earlier changes
        change()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(self._reported.wait(), 0.3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "m"
    path.mkdir()
    (path / "a.yaml").write_text("a: 1\n")
    return path


def swap(link: Path, target: str) -> None:
    temporary = link.with_name(f"{link.name}_tmp")
    temporary.symlink_to(target)
    temporary.rename(link)


async def test_edits_are_noticed_at_once(folder: Path) -> None:
    async with Watching(folder, safety_seconds=SAFETY) as watching:
        times = [
            await watching.notices(lambda n=n: (folder / "a.yaml").write_text(f"a: {n}\n")) for n in range(10)
        ]
        assert max(times) < AT_ONCE, times


@pytest.mark.parametrize("root", ["folder", "file"])
async def test_every_way_of_changing_a_file(folder: Path, root: str) -> None:
    file = folder / "a.yaml"

    def rename_over() -> None:
        (folder / "a.yaml~new").write_text("a: 2\n")
        (folder / "a.yaml~new").rename(file)

    async with Watching(folder if root == "folder" else file, safety_seconds=SAFETY) as watching:
        assert await watching.notices(rename_over) < AT_ONCE
        assert await watching.notices(rename_over) < AT_ONCE
        assert await watching.notices(lambda: file.chmod(0o600)) < AT_ONCE
        assert await watching.notices(file.unlink) < AT_ONCE
        assert await watching.notices(lambda: file.write_text("a: 3\n")) < AT_ONCE
        assert await watching.notices(lambda: os.truncate(file, 0)) < AT_ONCE


async def test_new_folders_are_watched(folder: Path) -> None:
    deep = folder / "x" / "y"
    async with Watching(folder, safety_seconds=SAFETY) as watching:
        assert await watching.notices(lambda: deep.mkdir(parents=True)) < AT_ONCE
        assert await watching.notices(lambda: (deep / "b.yaml").write_text("b: 1\n")) < AT_ONCE
        assert await watching.notices(lambda: (deep / "b.yaml").write_text("b: 2\n")) < AT_ONCE
        assert await watching.notices(lambda: (folder / "x").rename(folder / "z")) < AT_ONCE
        assert await watching.notices(lambda: (folder / "z/y/b.yaml").write_text("b: 3\n")) < AT_ONCE


@pytest.mark.parametrize("root", ["folder", "file"])
async def test_configmap_swaps(tmp_path: Path, root: str) -> None:
    mount = tmp_path / "cm"
    for version in ("1", "2", "3"):
        (mount / f"..{version}").mkdir(parents=True)
        (mount / f"..{version}" / "a.yaml").write_text(version)
    (mount / "..data").symlink_to("..1")
    (mount / "a.yaml").symlink_to("..data/a.yaml")
    async with Watching(mount if root == "folder" else mount / "a.yaml", safety_seconds=SAFETY) as watching:
        for version in ("2", "3", "1"):
            assert await watching.notices(lambda v=version: swap(mount / "..data", f"..{v}")) < AT_ONCE
        assert await watching.notices(lambda: (mount / "..1" / "a.yaml").write_text("x")) < AT_ONCE


async def test_targets_of_symbolic_links(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.yaml").write_text(name)
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "real"
    target.write_text("x")
    (tmp_path / "one" / "link.yaml").symlink_to(target)
    root = tmp_path / "current"
    root.symlink_to("one")
    async with Watching(root, safety_seconds=SAFETY) as watching:
        assert await watching.notices(lambda: target.write_text("y")) < AT_ONCE
        assert await watching.notices(lambda: (tmp_path / "one" / "a.yaml").write_text("z")) < AT_ONCE
        assert await watching.notices(lambda: swap(root, "two")) < AT_ONCE
        assert await watching.notices(lambda: (tmp_path / "two" / "a.yaml").write_text("z")) < AT_ONCE
        await watching.ignores(lambda: target.write_text("not ours any more"))


async def test_a_root_that_goes_and_comes_back(tmp_path: Path) -> None:
    root = tmp_path / "etc" / "proxyd"
    root.mkdir(parents=True)
    async with Watching(root, safety_seconds=SAFETY) as watching:
        for away in (root, root.parent):
            assert await watching.notices(lambda away=away: shutil.rmtree(away)) < AT_ONCE
            assert await watching.notices(lambda: root.mkdir(parents=True)) < AT_ONCE
            assert await watching.notices(lambda: (root / "a.yaml").write_text("a: 1\n")) < AT_ONCE


async def test_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "later" / "a.yaml"
    async with Watching(path, safety_seconds=SAFETY) as watching:
        assert await watching.notices(path.parent.mkdir) < AT_ONCE
        assert await watching.notices(lambda: path.write_text("a: 1\n")) < AT_ONCE


async def test_what_inotify_cannot_see_is_found_by_stamps(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b" / "m"
    root.mkdir(parents=True)
    (root / "x.yaml").write_text("x: 1\n")
    async with Watching(root, safety_seconds=0.3) as watching:
        # A grandparent is moved: no watched folder has an event.
        assert await watching.notices(lambda: (tmp_path / "a").rename(tmp_path / "z")) < AT_ONCE
        assert await watching.notices(lambda: (tmp_path / "z").rename(tmp_path / "a")) < AT_ONCE
        assert await watching.notices(lambda: (root / "x.yaml").write_text("x: 2\n")) < AT_ONCE


async def test_neighbours_are_none_of_its_business(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: 1\n")
    (tmp_path / "big" / "tree").mkdir(parents=True)
    async with Watching(file, safety_seconds=SAFETY) as watching:
        await watching.ignores(lambda: (tmp_path / "b.yaml").write_text("b"))
        await watching.ignores(lambda: (tmp_path / "big" / "tree" / "c.yaml").write_text("c"))
        await watching.ignores(file.read_text)


async def test_names_that_are_not_utf8_are_found_by_stamps(folder: Path) -> None:
    odd = folder / os.fsdecode(b"\xff")
    odd.mkdir()
    async with Watching(folder, safety_seconds=0.3, poll_seconds=0.3) as watching:
        assert await watching.notices(lambda: (odd / "x.yaml").write_text("x: 1\n")) < AT_ONCE
        assert (
            await watching.notices(lambda: (odd / os.fsdecode(b"\xff.yaml")).write_text("x: 1\n")) < AT_ONCE
        )
        assert await watching.notices(lambda: (folder / "a.yaml").write_text("a: 2\n")) < AT_ONCE
        assert len(watching.warnings) <= 1


async def test_hidden_files_are_ignored(folder: Path) -> None:
    async with Watching(folder, safety_seconds=SAFETY) as watching:
        await watching.ignores(lambda: (folder / ".a.yaml.swp").write_text("x"))


async def test_a_stream_of_changes_is_reported_while_it_lasts(folder: Path) -> None:
    async with Watching(folder, safety_seconds=SAFETY) as watching:
        before, began = watching.count, time.monotonic()
        n = 0
        while watching.count - before < 4 or time.monotonic() - began < 1:
            assert time.monotonic() - began < AT_ONCE, "it waits for their end"
            n += 1
            (folder / "a.yaml").write_text(f"a: {n}\n")
            await asyncio.sleep(0.003)
        # At most one each 20 ms.
        assert watching.count - before <= 2 + (time.monotonic() - began) / 0.02


async def test_it_ends_at_once_and_leaves_nothing(folder: Path) -> None:
    def instances() -> int:
        links = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        return sum("inotify" in link for link in links)

    async with Watching(folder):
        assert instances() == 1
        began = time.monotonic()
    assert time.monotonic() - began < AT_ONCE
    assert instances() == 0
    assert len(asyncio.all_tasks()) == 1


async def test_changes_while_the_caller_is_busy_are_reported_once(folder: Path) -> None:
    stream = watch([str(folder)], safety_seconds=SAFETY)
    async with contextlib.aclosing(stream):
        await asyncio.wait_for(anext(stream), AT_ONCE)
        for n in range(5):
            (folder / "a.yaml").write_text(f"a: {n}\n")
            await asyncio.sleep(0.1)  # the caller's work
        began = time.monotonic()
        await asyncio.wait_for(anext(stream), 2 * AT_ONCE)
        assert time.monotonic() - began < AT_ONCE
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.3)
