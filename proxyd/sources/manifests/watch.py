"""Watches manifests for changes: by inotify where there is one, and by comparing stamps as a safety net."""

# A scan handles thousands of names: pathlib takes ten times as long as os.path, and folds `a/..` away.
# ruff: noqa: PTH109, PTH114, PTH115, PTH116, PTH118, PTH120

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from proxyd.sources.manifests import inotify
from proxyd.sources.manifests.files import SUFFIXES, Survey, survey

# A file that was written and closed, or renamed to its name, is reported at once. A change that may be half
# of one is reported when nothing more has come for this long: a write without a close, or a name that is gone
# (editors move the old file away before they write the new one).
SETTLE_SECONDS = 0.05
# It is reported this long after it began at the latest.
_SETTLE_AT_MOST = 0.1
# Reports are at least this far apart. The first one comes at once.
_APART_SECONDS = 0.02
# More changed files than this are reported as a survey.
_MAX_NAMED = 1000
# Stamps are compared this often for what inotify misses: network file systems, a moved grandparent folder.
SAFETY_SECONDS = 5.0
# Stamps are compared this often where there is no inotify.
POLL_SECONDS = 1.0
# Comparing stamps takes at most this share of one core: it is done less often where it takes long.
_COMPARING_SHARE = 0.05
_RETRY_INOTIFY_SECONDS = 60.0
_MAX_LINKS = 40  # in one path; the kernel follows as many (path_resolution(7))

# The paths of files that may have changed, as a survey has them; or a survey, if more may have changed.
Change: TypeAlias = Survey | frozenset[str]


class Watched(NamedTuple):
    """A folder to watch, and the names in it that matter."""

    device: int
    inode: int
    whole: bool  # every name that does not start with a dot matters
    names: frozenset[str]  # these matter in any case


async def watch(
    paths: Sequence[str],
    *,
    warn: Callable[[str], None] = lambda _: None,
    safety_seconds: float = SAFETY_SECONDS,
    poll_seconds: float = POLL_SECONDS,
) -> AsyncIterator[Change]:
    """Yields the changes of the files that `paths` stand for.

    The first one is a survey, when watching has begun: a caller that reads everything then misses no change.
    Changes that come while the caller is busy are yielded once, afterwards. Where inotify has no more watches
    or instances to give, `warn` gets one line, and stamps are compared every `poll_seconds` instead.

    A caller that leaves the loop early closes the generator (`contextlib.aclosing`).

    Args:
        paths: files and folders, as for `ManifestSource`; they need not exist yet.
        warn: takes one line for the operator.
        safety_seconds: how often stamps are compared where inotify works.
        poll_seconds: how often stamps are compared where it does not.
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
    """Collects changes until they are taken. `news` is set while there are some."""

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
        # To be reported: a survey, and the files that changed after it.
        self._survey: Survey | None = None
        self._named: set[str] = set()
        # Files whose change may not be complete, and when it began; "" stands for the tree.
        self._unsettled: dict[str, float] = {}
        self._settling: asyncio.TimerHandle | None = None
        self._events = 0
        self._last_event = 0.0
        # Set while the tree may have changed and has to be surveyed. Changes of files wait for that: a survey
        # that is older than what was read of a file would undo it.
        self._asked = asyncio.Event()
        self._surveying = False

    def take(self) -> Iterator[Change]:
        """Yields what is to be reported, and forgets it."""
        self.news.clear()
        if self._survey is not None:
            found, self._survey = self._survey, None
            yield found
        if self._named and not (self._surveying or self._asked.is_set()):
            named, self._named = frozenset(self._named), set()
            yield named

    async def run(self) -> None:
        """Watch until cancelled; does not return."""
        while True:
            try:
                await self._by_inotify()
            except (FileNotFoundError, NotADirectoryError):
                await asyncio.sleep(_APART_SECONDS)  # a folder went away before it was watched: look again
            except OSError as error:
                self._degrade(error)
                await self._by_comparing(self._loop.time() + _RETRY_INOTIFY_SECONDS)

    async def _by_inotify(self) -> None:
        """Watch by inotify until it fails, which raises OSError."""
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
        """Survey the tree, and watch its folders. Returns how many seconds that took."""
        began = self._loop.time()
        asked, events = self._asked.is_set(), self._events
        self._surveying = asked
        self._asked.clear()
        found = await asyncio.to_thread(survey, self._paths)
        plan = await asyncio.to_thread(watch_plan, self._paths, found)
        if self._follow(notify, plan):
            # One more survey finds what happened in a folder before it was watched.
            self._asked.set()
        elif asked or (found != self._seen and events == self._events):
            # A survey that nobody asked for is dropped if files changed meanwhile: it may be older.
            self._survey = self._seen = found
            self._surveying = False
            self.news.set()
        return self._loop.time() - began

    def _follow(self, notify: inotify.Inotify, plan: dict[str, Watched]) -> bool:
        """Watch the folders of a plan, and no others. Returns whether one was not watched before."""
        more = False
        watched = notify.folders
        for folder, entry in plan.items():
            known = self._plan.get(folder)
            if folder in watched and known is not None and known[:2] == entry[:2]:
                continue
            if os.access(folder, os.R_OK, effective_ids=True):  # else inotify refuses it
                notify.watch(folder)
                more = True
        for folder in watched.difference(plan):
            notify.unwatch(folder)
        self._plan = plan
        return more

    def _readable(self, notify: inotify.Inotify) -> None:
        moved = (0, "")  # the cookie of the last rename, and the file that it moved away
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
        """Compare stamps until the loop's time is `until`."""
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
    """The folders, by real path, whose entries decide what `survey(paths)` finds.

    They are the folders of the tree, and for each configured path and each symbolic link in the tree: the
    folder of every link on the way to its target (so that the swap of a `..data` link is noticed), the folder
    of the target (so that its replacement is noticed), and if the way ends early the folder in which the next
    name would appear.
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
            continue  # it has just gone away: the next survey will tell
        plan[folder] = Watched(info.st_dev, info.st_ino, folder in seen.folders, frozenset(wanted))
    return plan


def _way(folder: str, path: str) -> Iterator[tuple[str, str]]:
    """Yields the (real folder, name) pairs that decide where `path` leads from the real `folder`."""
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
        except OSError:  # it is not a link, or does not exist
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
