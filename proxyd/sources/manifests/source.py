"""The manifests source: reads the files that changed, and merges all files into one set of objects."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from proxyd.api.decode import KubeObject, Rules
from proxyd.api.problems import Severity
from proxyd.sources.manifests.files import MAX_FILES, FileEntry, Stamp, Survey, display, reason, survey
from proxyd.sources.manifests.merging import FileState, Key, ManifestSet, Merger, by_kind, key_of, problem_of
from proxyd.sources.manifests.parse import ParsedFile, parse_file
from proxyd.sources.manifests.regular import digest as digest_of
from proxyd.sources.manifests.regular import read_regular
from proxyd.sources.manifests.watch import Change

__all__ = ["ManifestSet", "ManifestSource"]

# All files together may have so many bytes; files that would exceed it are not read.
MAX_TOTAL_BYTES = 512 << 20
_NAMED_AT_MOST = 3


class ManifestSource:
    """Objects from files and folders.

    Args:
        paths: files and folders; a folder is searched recursively for *.yaml, *.yml and *.json. Entries whose
            name starts with a dot are skipped.
        rules: what is valid.
    """

    def __init__(self, paths: Sequence[str], rules: Rules) -> None:
        self._paths = tuple(path.rstrip("/") or path for path in paths)
        self._rules = rules
        self._states: dict[str, FileState] = {}  # by path
        self._total = 0  # bytes in all files
        self._seen: Survey | None = None
        self._merger = Merger(self._paths)

    def scan(self, change: Change | None = None) -> ManifestSet:
        """Reads the files that changed since the last scan, and returns all objects in force.

        If nothing changed it returns the same value as the last time, and each object that did not change is
        the same Python object as before. It may run in a thread, one scan at a time. It raises nothing: a
        file that cannot be read is a Problem, and what the file defined before stays in force.

        Where two files define an object, the file whose version is in force keeps it, or else the first in
        order of path has it; the other one gets a Problem. An object in error keeps its earlier good version
        as long as its file has it. A file that was emptied (0 bytes) is taken for one that is being written:
        what it defined stays in force until the file has content or is deleted.

        Args:
            change: as `watch` yields it: the paths of files to look at, or a survey. None: all is looked at.
        """
        if isinstance(change, frozenset):
            found = self._named(change)
            if found is not None:
                return self._put(found)
            change = None
        seen = survey(self._paths) if change is None else change
        states = self._unseen(seen)
        self._total = self._look(seen.files, states)
        if seen != self._seen or not _same_objects(states, self._states):
            self._seen = seen
            self._states = dict(sorted(states.items()))
            self._merger.merge(self._states, seen)
        else:
            self._states = dict(sorted(states.items()))
        return self._merger.last

    def _look(self, files: Sequence[FileEntry], states: dict[str, FileState]) -> int:
        """Add the states of these files. Returns the bytes of those that the limit admits."""
        total = 0
        for entry in files:
            state = self._states.get(entry.path)
            total += entry.stamp.size
            if total > MAX_TOTAL_BYTES:
                total -= entry.stamp.size
                limit = f"not read: the manifests together are over {MAX_TOTAL_BYTES >> 20} MiB"
                state = _unread(entry.path, state, limit)
            elif state is None or state.stamp != entry.stamp:
                state = self._read(entry, state)
            states[entry.path] = state
        return total

    def _named(self, paths: Iterable[str]) -> dict[str, FileState | None] | None:
        """The new states of these files, None for one that is gone; None if it takes a survey to tell."""
        seen = self._seen
        if seen is None or seen.unreadable or len(self._states) + 1 >= MAX_FILES:
            return None
        found: dict[str, FileState | None] = {}
        for path in paths:
            known = self._states.get(path)
            try:
                info = os.lstat(path)
            except FileNotFoundError:
                if known is not None:
                    found[path] = None
                continue
            except OSError:
                return None
            # A survey decides under which path a file is listed that can be reached in two ways.
            unique = info.st_nlink == 1 and (known is not None or (len(self._paths) == 1 and not seen.links))
            if not stat.S_ISREG(info.st_mode) or not unique:
                return None
            entry = FileEntry(path, Stamp.of(info))
            if self._total + entry.stamp.size > MAX_TOTAL_BYTES:
                return None
            if known is None or known.stamp != entry.stamp:
                found[path] = self._read(entry, known)
                # A file that was counted before counts twice until the next survey.
                self._total += entry.stamp.size
        return found

    def _put(self, found: Mapping[str, FileState | None]) -> ManifestSet:
        """Put the new states of some files in force. Returns all objects in force."""
        earlier = {path: self._states.get(path) for path in found}
        new_name = False
        for path, state in found.items():
            if state is None:
                del self._states[path]
            else:
                new_name |= path not in self._states
                self._states[path] = state
        if new_name:
            self._states = dict(sorted(self._states.items()))
        assert self._seen is not None
        if not self._merger.patch(earlier, found, len(self._states)):
            self._merger.merge(self._states, self._seen)
        return self._merger.last

    def _unseen(self, seen: Survey) -> dict[str, FileState]:
        """The states of paths that a survey could not read, and of earlier files below them."""
        reasons = dict(seen.unreadable)
        states = {}
        for path, why in reasons.items():
            holds = any(_below(known, {path}) for known in self._states)
            states[path] = _unread(path, self._states.get(path), why, holds=holds)
        if reasons:
            present = {entry.path for entry in seen.files}
            for path, state in self._states.items():
                if path not in present and path not in states and _below(path, reasons):
                    states[path] = msgspec.structs.replace(state, stamp=None, complete=False)
        return states

    def _read(self, entry: FileEntry, earlier: FileState | None) -> FileState:
        try:
            data, stamp = read_regular(entry.path)
        except FileNotFoundError:
            return earlier or FileState()  # it has just been deleted: the next survey will not list it
        except (OSError, ValueError) as error:
            return _unread(entry.path, earlier, reason(error))
        digest = digest_of(data)
        if earlier and earlier.digest == digest:
            return msgspec.structs.replace(earlier, stamp=stamp)
        in_force = {**earlier.kept, **earlier.objects} if earlier else {}
        if not data and in_force:
            why = "is empty: what it defined stays in force until it has content or is deleted"
            return msgspec.structs.replace(
                _unread(entry.path, None, why), stamp=stamp, kept=in_force, digest=digest
            )
        label = display(entry.path)
        if earlier:
            parsed = parse_file(label, data, self._rules, earlier.known, earlier.layout)
        else:
            parsed = parse_file(label, data, self._rules)
        return self._state(label, parsed, in_force, stamp, digest)

    def _state(
        self,
        label: str,
        parsed: ParsedFile,
        in_force: Mapping[Key, KubeObject],
        stamp: Stamp | None,
        digest: bytes,
    ) -> FileState:
        """The state of a file that was read; `in_force` is what it defined before."""
        problems = list(parsed.problems)
        objects: dict[Key, KubeObject] = {}
        if parsed.swapped is None:
            _take(objects, parsed.objects, in_force)
        else:
            old, new = parsed.swapped
            # Where the same objects are defined, keys stay in order, and the same Python objects.
            objects.update(in_force)
            for key in {*map(key_of, old)}.difference(map(key_of, new)):
                del objects[key]
            _take(objects, new, in_force)
        rejected = frozenset(parsed.rejected)
        doubtful = rejected if parsed.complete else rejected | (in_force.keys() - objects.keys())
        kept = {}
        for key in sorted(doubtful):
            # Until now another file may have defined the object.
            version = in_force.get(key) or by_kind(self._merger.last, key[0]).get(key[1])
            if version is not None:
                kept[key] = version
        if kept:
            problems.append(
                problem_of(label, f"in force as before: {_listed(kept)}", severity=Severity.WARNING)
            )
        return FileState(
            stamp=stamp,
            digest=digest,
            objects=objects,
            kept=kept,
            rejected=rejected,
            problems=tuple(problems),
            complete=parsed.complete,
            known=parsed.known,
            layout=parsed.layout,
        )


def _take(
    objects: dict[Key, KubeObject], items: Iterable[KubeObject], in_force: Mapping[Key, KubeObject]
) -> None:
    """Add objects. One that equals its earlier version is added as that very Python object."""
    for item in items:
        key = key_of(item)
        earlier = in_force.get(key)
        objects[key] = earlier if earlier is not None and earlier == item else item


def _unread(path: str, earlier: FileState | None, why: str, *, holds: bool = False) -> FileState:
    """The state of a path that cannot be read: what it defined before, and a Problem."""
    state = earlier or FileState()
    if holds or state.objects or state.kept:
        why += ": what it defined stays in force"
    return msgspec.structs.replace(
        state, stamp=None, digest=b"", problems=(problem_of(display(path), why),), complete=False
    )


def _below(path: str, folders: Collection[str]) -> bool:
    """Whether `path` is in one of `folders`, at any depth."""
    while path not in {"", "/"}:
        path = os.path.split(path)[0]
        if path in folders:
            return True
    return False


def _same_objects(new: Mapping[str, FileState], old: Mapping[str, FileState]) -> bool:
    """Whether states differ in nothing but stamps."""
    return new.keys() == old.keys() and all(
        state is (known := old[path])
        or (
            state.objects is known.objects
            and (state.kept, state.rejected, state.problems, state.complete)
            == (known.kept, known.rejected, known.problems, known.complete)
        )
        for path, state in new.items()
    )


def _listed(keys: Iterable[Key]) -> str:
    names = [f"{kind} {name}" for kind, name in keys]
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
