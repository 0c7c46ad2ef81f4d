"""Noticing that manifests may have changed: inotify where there is some, comparing stamps as the safety net."""

# Thousands of names a scan: strings and os.path cost a tenth of pathlib, which also folds `a/..` away.
# ruff: noqa: PTH109, PTH115, PTH116, PTH118, PTH120

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

# watchfiles.awatch watches whole trees or none, and one set of folders for its life; this is what it is made of.
from watchfiles._rust_notify import RustNotify

from proxyd.sources.files import Survey, survey

# The thread looks for events this often (0.4 % of a core), and reports them when nothing more came for as long.
STEP_MS = 20
# A stream of changes is reported at least this often.
DEBOUNCE_MS = 80
# Stamps are compared this often in case inotify missed something: network file systems, a moved grandparent folder.
SAFETY_SECONDS = 5.0
# The same where there is no inotify.
POLL_SECONDS = 1.0
# Comparing stamps takes at most this share of one core, whatever was asked for.
_COMPARING_SHARE = 0.05
_RETRY_INOTIFY_SECONDS = 60.0
_SURROGATES = re.compile("[\ud800-\udfff]")  # bytes of a file name that are not UTF-8
_MAX_LINKS = 40  # the kernel follows as many symbolic links in one path


class Watched(NamedTuple):
    """One folder to watch: which one it is, and the names in it that matter."""

    device: int
    inode: int
    whole: bool  # every name that does not start with a dot matters
    names: frozenset[str]  # and so do these


async def watch(
    paths: Sequence[str],
    *,
    warn: Callable[[str], None] = lambda _: None,
    safety_seconds: float = SAFETY_SECONDS,
    poll_seconds: float = POLL_SECONDS,
) -> AsyncIterator[None]:
    """Yields whenever what `paths` stand for may have changed.

    It first yields when watching has begun: who reads everything then misses nothing. Changes that come while the caller
    is busy are reported once, afterwards. Where inotify has no more watches or instances to give, or meets a name that is
    not UTF-8, `warn` gets one line and the stamps of all files are compared every `poll_seconds` instead.

    Closed or cancelled, it ends its thread within 0.1 s. Where the loop goes on after a `break`, close it
    (`contextlib.aclosing`).

    Args:
        paths: files and folders, as for `ManifestSource`; they need not exist yet.
        warn: takes one line for the operator, in the loop's thread.
        safety_seconds: how often stamps are compared beside inotify.
        poll_seconds: how often they are compared instead of it.
    """
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    watcher = _Watcher(
        tuple(paths),
        report=lambda: loop.call_soon_threadsafe(changed.set),
        warn=lambda text: loop.call_soon_threadsafe(warn, text),
        safety_seconds=safety_seconds,
        poll_seconds=poll_seconds,
    )
    watcher.start()
    try:
        while True:
            await changed.wait()
            changed.clear()
            yield None
    finally:
        watcher.stop()
        await asyncio.to_thread(watcher.join, 1.0)


class _Watcher(threading.Thread):
    """One thread that waits for inotify events, and compares stamps from time to time."""

    def __init__(
        self,
        paths: tuple[str, ...],
        *,
        report: Callable[[], object],
        warn: Callable[[str], object],
        safety_seconds: float,
        poll_seconds: float,
    ) -> None:
        super().__init__(name="manifest-watch", daemon=True)
        self._paths = paths
        self._report = report
        self._warn = warn
        self._safety_seconds = safety_seconds
        self._poll_seconds = poll_seconds
        self._stopping = threading.Event()
        self._warned = False
        self._inotify_from = 0.0  # monotonic time

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                if time.monotonic() < self._inotify_from:
                    self._by_comparing()
                else:
                    self._by_inotify()
            except FileNotFoundError:
                self._stopping.wait(STEP_MS / 1000)  # a folder vanished before it was watched: look again
            except (OSError, RuntimeError) as error:
                # RuntimeError is also what a closed loop gives, and then stop() is on its way.
                self._degrade(error)

    def _by_inotify(self) -> None:
        """Watches until other folders are to be watched. Raises OSError or RuntimeError where inotify fails."""
        plan = watch_plan(self._paths, survey(self._paths))
        # Arguments: debug, force_polling, poll_delay_ms, recursive, ignore_permission_denied (which would also ignore that
        # there are no more watches).
        with _closing(
            RustNotify([folder for folder in plan if _watchable(folder)], False, False, 0, False, False)
        ) as notify:
            seen = survey(self._paths)
            self._report()
            due = time.monotonic() + self._safety_seconds
            while watch_plan(self._paths, seen) == plan:
                wait_ms = max(1, round((due - time.monotonic()) * 1000))
                events = notify.watch(DEBOUNCE_MS, STEP_MS, wait_ms, self._stopping)
                if self._stopping.is_set():
                    return
                matters = not isinstance(events, str) and any(_matters(path, plan) for _, path in events)
                if matters:
                    self._report()
                elif time.monotonic() < due:
                    continue
                began = time.monotonic()
                now = survey(self._paths)
                if not matters and now != seen:
                    self._report()
                seen = now
                due = time.monotonic() + max(
                    self._safety_seconds, (time.monotonic() - began) / _COMPARING_SHARE
                )

    def _by_comparing(self) -> None:
        """Compares stamps until inotify is to be tried again."""
        seen = survey(self._paths)
        self._report()
        took = 0.0
        while time.monotonic() < self._inotify_from:
            if self._stopping.wait(max(self._poll_seconds, took / _COMPARING_SHARE)):
                return
            began = time.monotonic()
            now = survey(self._paths)
            took = time.monotonic() - began
            if now != seen:
                self._report()
            seen = now

    def _degrade(self, error: Exception) -> None:
        self._inotify_from = time.monotonic() + _RETRY_INOTIFY_SECONDS
        if self._warned or self._stopping.is_set():
            return
        self._warned = True
        exhausted = any(sign in str(error) for sign in ("watch limit", "Too many open files"))
        # The wrapper gives up at any event, even of our own reading, whose name is not UTF-8.
        why = "no more inotify watches or instances" if exhausted else f"inotify failed ({error})"
        advice = "; raise fs.inotify.max_user_watches and fs.inotify.max_user_instances" if exhausted else ""
        with contextlib.suppress(RuntimeError):
            self._warn(
                f"manifests: {why}: looking for changes every {self._poll_seconds:g} s instead{advice}"
            )


@contextlib.contextmanager
def _closing(notify: RustNotify) -> Iterator[RustNotify]:
    try:
        yield notify
    finally:
        notify.close()


def _watchable(folder: str) -> bool:
    """Whether inotify takes the folder: it wants to be allowed to read it, and its wrapper a name in UTF-8."""
    return os.access(folder, os.R_OK, effective_ids=True) and not _SURROGATES.search(folder)


def _matters(path: str, plan: Mapping[str, Watched]) -> bool:
    """Whether an event at `path` may change what a survey sees."""
    folder, name = os.path.split(path)
    watched = plan.get(folder)
    if watched is not None and (name in watched.names or (watched.whole and not name.startswith("."))):
        return True
    return path in plan  # the folder itself was moved or deleted


def watch_plan(paths: Sequence[str], seen: Survey) -> dict[str, Watched]:
    """The folders, by real path, whose entries decide what `survey(paths)` sees.

    They are the folders of the tree, and for each configured path and each symbolic link in the tree: the folder of
    every link on the way to its target (so that a `..data` swap is noticed), the folder of the target (so that rename-over
    and re-creation are), and where the way ends early the folder in which the next name would appear.
    """
    names: dict[str, set[str]] = {folder: set() for folder in seen.folders}
    real: dict[str, str] = {}
    for path in paths:
        for folder, name in _way("/", os.path.join(os.getcwd(), path)):
            names.setdefault(folder, set()).add(name)
    for link in seen.links:
        parent, base = os.path.split(link)
        if parent not in real:
            real[parent] = os.path.realpath(parent)
        for folder, name in _way(real[parent], base):
            names.setdefault(folder, set()).add(name)
    plan = {}
    for folder, wanted in names.items():
        try:
            info = os.stat(folder)
        except OSError:
            continue  # went away just now: the next survey sees it
        plan[folder] = Watched(info.st_dev, info.st_ino, folder in seen.folders, frozenset(wanted))
    return plan


def _way(folder: str, path: str) -> Iterator[tuple[str, str]]:
    """The (real folder, name) pairs that decide where `path`, seen from the real `folder`, leads."""
    todo = _parts(path)
    links = 0
    while todo:
        name = todo.pop()
        if name == "..":
            folder = os.path.dirname(folder)
            continue
        here = os.path.join(folder, name)
        try:
            target = os.readlink(here)
        except OSError:  # not a link, or not there
            exists = os.path.lexists(here)
            if not todo or not exists:
                yield folder, name
            if not exists:
                return
            folder = here
            continue
        yield folder, name
        links += 1
        if links > _MAX_LINKS:
            return
        todo += _parts(target)
        if target.startswith("/"):
            folder = "/"


def _parts(path: str) -> list[str]:
    """The names in a path, the first one last."""
    return [part for part in reversed(path.split("/")) if part not in {"", "."}]
