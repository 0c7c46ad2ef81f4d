"""Noticing that manifests changed, and which: inotify where there is some, comparing stamps as the safety net."""

# Thousands of names a scan: strings and os.path cost a tenth of pathlib, which also folds `a/..` away.
# ruff: noqa: PTH109, PTH114, PTH115, PTH116, PTH118, PTH120

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from proxyd.sources.manifests import inotify
from proxyd.sources.manifests.files import SUFFIXES, Survey, survey

# A file that was written and closed, or renamed to its name, is reported at once. What may be half of something is
# reported when nothing more came for so long: a write without a close, and a name that is gone (editors move the old
# file away before they write the new one).
SETTLE_SECONDS = 0.05
# But not later than this after it began.
_SETTLE_AT_MOST = 0.1
# Reports are at least so far apart. The first one comes at once.
_APART_SECONDS = 0.02
# More changed files than this are reported as a survey.
_MAX_NAMED = 1000
# Stamps are compared this often in case inotify missed something: network file systems, a moved grandparent folder.
SAFETY_SECONDS = 5.0
# The same where there is no inotify.
POLL_SECONDS = 1.0
# Comparing stamps takes at most this share of one core, whatever was asked for.
_COMPARING_SHARE = 0.05
_RETRY_INOTIFY_SECONDS = 60.0
_MAX_LINKS = 40  # the kernel follows as many symbolic links in one path

# The files that may have changed, by path as a survey names them; or, where more may have changed, what is there now.
Change: TypeAlias = Survey | frozenset[str]


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
) -> AsyncIterator[Change]:
    """Yields what may have changed of what `paths` stand for.

    It first yields a survey when watching has begun: who reads everything then misses nothing. Changes that come while
    the caller is busy are reported once, afterwards. Where inotify has no more watches or instances to give, `warn`
    gets one line and the stamps of all files are compared every `poll_seconds` instead.

    Where the loop goes on after a `break`, close it (`contextlib.aclosing`).

    Args:
        paths: files and folders, as for `ManifestSource`; they need not exist yet.
        warn: takes one line for the operator.
        safety_seconds: how often stamps are compared beside inotify.
        poll_seconds: how often they are compared instead of it.
    """
    watcher = _Watcher(tuple(paths), warn, safety_seconds, poll_seconds)
    following = asyncio.ensure_future(watcher.run())
    following.add_done_callback(lambda _: watcher.news.set())
    try:
        while True:
            await watcher.news.wait()
            if following.done():
                following.result()
            for change in watcher.take():
                yield change
            await asyncio.sleep(_APART_SECONDS)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


class _Watcher:
    """Collects changes until they are taken."""

    def __init__(
        self, paths: tuple[str, ...], warn: Callable[[str], None], safety_seconds: float, poll_seconds: float
    ) -> None:
        self.news = asyncio.Event()
        self._paths = paths
        self._warn = warn
        self._safety_seconds = safety_seconds
        self._poll_seconds = poll_seconds
        self._loop = asyncio.get_running_loop()
        self._warned = False
        self._seen = Survey()
        self._plan: dict[str, Watched] = {}
        # What is to be reported: a survey, and files that changed after it.
        self._survey: Survey | None = None
        self._named: set[str] = set()
        # What may not be complete yet, files or "" for the tree, and since when.
        self._unsettled: dict[str, float] = {}
        self._settling: asyncio.TimerHandle | None = None
        self._events = 0
        self._last_event = 0.0
        # The tree may have changed: it is to be surveyed, and changes of files wait for that, as a survey that is older
        # than what was read would take it back.
        self._asked = asyncio.Event()
        self._surveying = False

    def take(self) -> Iterator[Change]:
        """What is to be reported now; it is then reported."""
        self.news.clear()
        if self._survey is not None:
            found, self._survey = self._survey, None
            yield found
        if self._named and not (self._surveying or self._asked.is_set()):
            named, self._named = frozenset(self._named), set()
            yield named

    async def run(self) -> None:
        """Watches; does not return."""
        while True:
            try:
                await self._by_inotify()
            except (FileNotFoundError, NotADirectoryError):
                await asyncio.sleep(_APART_SECONDS)  # a folder vanished before it was watched: look again
            except OSError as error:
                self._degrade(error)
                await self._by_comparing(self._loop.time() + _RETRY_INOTIFY_SECONDS)

    async def _by_inotify(self) -> None:
        """Raises OSError where inotify fails."""
        notify = inotify.Inotify()
        self._loop.add_reader(notify.fileno(), self._readable, notify)
        try:
            self._asked.set()
            took = 0.0
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(self._safety_seconds, took / _COMPARING_SHARE)):
                        await self._asked.wait()
                took = await self._look(notify)
        finally:
            self._loop.remove_reader(notify.fileno())
            notify.close()
            if self._settling is not None:
                self._settling.cancel()
                self._settling = None
            self._unsettled.clear()
            self._surveying = False

    async def _look(self, notify: inotify.Inotify) -> float:
        """Survey the tree once, and watch what is in it. Returns how long it took."""
        began = self._loop.time()
        asked, events = self._asked.is_set(), self._events
        self._surveying = asked
        self._asked.clear()
        found = await asyncio.to_thread(survey, self._paths)
        plan = await asyncio.to_thread(watch_plan, self._paths, found)
        if self._follow(notify, plan):
            # What happened in a folder before it was watched is found by looking once more.
            self._asked.set()
        elif asked or (found != self._seen and events == self._events):
            # Where files are changing just now, stamps are compared the next time.
            self._survey = self._seen = found
            self._surveying = False
            self.news.set()
        return self._loop.time() - began

    def _follow(self, notify: inotify.Inotify, plan: dict[str, Watched]) -> bool:
        """Watch the folders of a plan. Returns whether there is one that was not watched."""
        more = False
        watched = notify.folders
        for folder, entry in plan.items():
            known = self._plan.get(folder)
            if folder in watched and known is not None and known[:2] == entry[:2]:
                continue
            if os.access(folder, os.R_OK, effective_ids=True):  # else inotify does not take it
                notify.watch(folder)
                more = True
        for folder in watched.difference(plan):
            notify.unwatch(folder)
        self._plan = plan
        return more

    def _readable(self, notify: inotify.Inotify) -> None:
        moved = (0, "")  # the cookie of a rename, and the file that it took away
        for event in notify.read():
            self._events += 1
            if event.mask & inotify.OVERFLOW:
                self._ask()
                continue
            watched = self._plan.get(event.folder)
            if watched is None or event.mask & inotify.IGNORED:
                continue
            if not event.name:
                self._settle("")
                continue
            listed = event.name in watched.names
            if not listed and (not watched.whole or event.name.startswith(".")):
                continue
            arrives = bool(event.mask & (inotify.CREATE | inotify.MOVED_TO))
            if listed or event.mask & inotify.ISDIR or (arrives and _is_link(event)):
                if arrives or event.mask & inotify.CLOSE_WRITE:
                    self._ask()
                else:
                    self._settle("")
            elif event.folder not in self._seen.shown:
                self._ask()
            elif event.name.endswith(SUFFIXES):
                path = os.path.join(self._seen.shown[event.folder], event.name)
                if event.mask & (inotify.CLOSE_WRITE | inotify.MOVED_TO):
                    names = {path, moved[1]} if event.cookie and event.cookie == moved[0] else {path}
                    self._report(names)
                else:
                    self._settle(path)
                    if event.mask & inotify.MOVED_FROM:
                        moved = (event.cookie, path)

    def _ask(self) -> None:
        self._unsettled.pop("", None)
        self._asked.set()

    def _report(self, names: Collection[str]) -> None:
        for name in names:
            self._unsettled.pop(name, None)
        self._named.update(names)
        if len(self._named) > _MAX_NAMED:
            self._named.clear()
            self._ask()
        self.news.set()

    def _settle(self, name: str) -> None:
        self._last_event = self._loop.time()
        if len(self._unsettled) >= _MAX_NAMED:
            self._unsettled.clear()
            name = ""
        self._unsettled.setdefault(name, self._last_event)
        if self._settling is None:
            self._settling = self._loop.call_later(SETTLE_SECONDS, self._settled)

    def _settled(self) -> None:
        self._settling = None
        if not self._unsettled:
            return
        now = self._loop.time()
        due = min(self._last_event + SETTLE_SECONDS, min(self._unsettled.values()) + _SETTLE_AT_MOST)
        if due > now:
            self._settling = self._loop.call_at(due, self._settled)
            return
        names = self._unsettled.keys()
        self._unsettled = {}
        if "" in names:
            self._ask()
        self._report([name for name in names if name])

    async def _by_comparing(self, until: float) -> None:
        """Compares stamps until a time of the loop."""
        took = 0.0
        reported = False
        while self._loop.time() < until:
            began = self._loop.time()
            found = await asyncio.to_thread(survey, self._paths)
            took = self._loop.time() - began
            if found != self._seen or not reported:
                self._survey = self._seen = found
                self._named.clear()
                self.news.set()
                reported = True
            await asyncio.sleep(max(self._poll_seconds, took / _COMPARING_SHARE))

    def _degrade(self, error: OSError) -> None:
        if self._warned:
            return
        self._warned = True
        exhausted = inotify.exhausted(error)
        why = "no more inotify watches or instances" if exhausted else f"inotify failed ({error})"
        advice = "; raise fs.inotify.max_user_watches and fs.inotify.max_user_instances" if exhausted else ""
        self._warn(f"manifests: {why}: looking for changes every {self._poll_seconds:g} s instead{advice}")


def _is_link(event: inotify.Event) -> bool:
    return os.path.islink(os.path.join(event.folder, event.name))


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
