"""Merges the objects of all files into one set, and decides which file's version of an object is in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import msgspec

from proxyd.api.decode import Decoded, KubeObject
from proxyd.api.discovery import Endpoints, EndpointSlice
from proxyd.api.meta import ObjectName
from proxyd.api.pod import Pod
from proxyd.api.problems import Problem, Severity
from proxyd.api.service import Service
from proxyd.sources.manifests.edits import Layout
from proxyd.sources.manifests.files import Stamp, Survey, display
from proxyd.state.changes import touched

Key: TypeAlias = tuple[str, ObjectName]  # kind and name


class ManifestSet(msgspec.Struct, frozen=True, kw_only=True):
    """Every object in force from manifests, and what is wrong with them.

    Attributes:
        services, endpoints, slices, pods: the objects, by name.
        origins: the file that each object comes from.
        rejected: Services in error that have no earlier good version in force.
        problems: in order of file and line.
        missing: configured paths that cannot be read at all.
        files: how many files there are.
        complete: False while a file or folder cannot be read in full: it may define further objects.
    """

    services: Mapping[ObjectName, Service] = {}
    endpoints: Mapping[ObjectName, Endpoints] = {}
    slices: Mapping[ObjectName, EndpointSlice] = {}
    pods: Mapping[ObjectName, Pod] = {}
    origins: Mapping[Key, str] = {}
    rejected: frozenset[ObjectName] = frozenset()
    problems: tuple[Problem, ...] = ()
    missing: tuple[str, ...] = ()
    files: int = 0
    complete: bool = True


class FileState(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in one file, and what stays in force of what it had before."""

    stamp: Stamp | None = None  # None: read it again at the next scan
    digest: bytes = b""  # of the content that was read last
    objects: Mapping[Key, KubeObject] = {}  # those that it defines now
    kept: Mapping[Key, KubeObject] = {}  # earlier versions of objects that are in error now
    rejected: frozenset[Key] = frozenset()
    problems: tuple[Problem, ...] = ()
    complete: bool = True
    known: Mapping[str, Decoded] = {}  # see ParsedFile
    layout: Layout | None = None  # see ParsedFile


class Merger:
    """Merges the states of all files, each time they change.

    Args:
        paths: the configured paths.

    Attributes:
        last: the objects that are in force.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.last = ManifestSet()
        self._paths = paths
        self._owners: dict[Key, str] = {}  # path of the file whose version is in force
        self._several: set[Key] = set()  # objects that several files define, or that are in error in one

    def patch(
        self, earlier: Mapping[str, FileState | None], found: Mapping[str, FileState | None], files: int
    ) -> bool:
        """Put the changes of some files in force, if no other file has a say in them.

        Args:
            earlier: the states of these files before, by path; None: there was no such file.
            found: their states now; None: the file is gone.
            files: how many files there are now.

        Returns:
            Whether that was possible; if not, `merge` is needed.
        """
        gone: dict[Key, str] = {}
        new: dict[Key, tuple[str, KubeObject]] = {}
        for path, state in found.items():
            old = earlier[path]
            if not (_plain(old) and _plain(state)):
                return False
            after = state.objects if state else {}
            for key in touched(old.objects if old else {}, after):
                if key not in after:
                    gone[key] = path
                elif key in new:
                    return False
                else:
                    new[key] = (path, after[key])
        if not self._several.isdisjoint(gone) or not self._several.isdisjoint(new):
            return False
        if any(
            self._owners.get(key) not in (None, path) and key not in gone for key, (path, _) in new.items()
        ):
            return False
        if not (gone or new) and files == self.last.files:
            return True
        kinds: dict[str, dict[ObjectName, KubeObject]] = {}
        for kind in {kind for kind, _ in (*gone, *new)}:
            kinds[kind] = dict(by_kind(self.last, kind))
        origins = dict(self.last.origins)
        for key in gone:
            del self._owners[key], origins[key], kinds[key[0]][key[1]]
        for key, (path, thing) in new.items():
            self._owners[key] = path
            origins[key] = display(path)
            kinds[key[0]][key[1]] = thing
        fields = {_FIELDS[kind]: objects for kind, objects in kinds.items()}
        self.last = msgspec.structs.replace(self.last, origins=origins, files=files, **fields)
        return True

    def merge(self, states: Mapping[str, FileState], seen: Survey) -> None:
        """Decide anew which objects are in force.

        Args:
            states: of all files, by path, in order.
            seen: the survey that lists these files.
        """
        owners: dict[Key, str] = {}
        several: set[Key] = set()
        labels = {path: display(path) for path in states}
        for path, state in states.items():
            for key in state.objects:
                if key in owners:
                    several.add(key)
                if key not in owners or self._owners.get(key) == path:
                    owners[key] = path
        problems = [problem_of(display(path), why, severity=Severity.WARNING) for path, why in seen.remarks]
        for path, state in states.items():
            problems += state.problems
            for key in state.objects:
                if owners[key] != path:
                    problems.append(
                        problem_of(labels[path], f"already defined in {labels[owners[key]]}", key)
                    )
        chosen = {key: states[path].objects[key] for key, path in owners.items()}
        for path, state in states.items():
            several |= state.rejected
            for key, version in state.kept.items():
                several.add(key)
                if key not in chosen:
                    chosen[key] = version
                    owners[key] = path
        self._owners, self._several = owners, several
        rejected = (key for state in states.values() for key in state.rejected if key not in chosen)
        unreadable = dict(seen.unreadable)
        merged = ManifestSet(
            services={key[1]: item for key, item in chosen.items() if isinstance(item, Service)},
            endpoints={key[1]: item for key, item in chosen.items() if isinstance(item, Endpoints)},
            slices={key[1]: item for key, item in chosen.items() if isinstance(item, EndpointSlice)},
            pods={key[1]: item for key, item in chosen.items() if isinstance(item, Pod)},
            origins={key: labels[path] for key, path in owners.items()},
            rejected=frozenset(name for kind, name in rejected if kind == Service.__name__),
            problems=tuple(sorted(problems, key=lambda p: (p.file, p.line, p.column))),
            missing=tuple(display(path) for path in self._paths if path in unreadable),
            files=len(seen.files),
            complete=all(state.complete for state in states.values()),
        )
        if merged != self.last:
            self.last = merged


def key_of(item: KubeObject) -> Key:
    """Kind and name of an object."""
    return type(item).__name__, item.metadata.key


def _plain(state: FileState | None) -> bool:
    """Whether a file was read in full and has no problem (also: there is no such file)."""
    return state is None or (state.complete and not (state.kept or state.rejected or state.problems))


_FIELDS = {
    Service.__name__: "services",
    Endpoints.__name__: "endpoints",
    EndpointSlice.__name__: "slices",
    Pod.__name__: "pods",
}


def by_kind(manifests: ManifestSet, kind: str) -> Mapping[ObjectName, KubeObject]:
    """The objects of one kind that are in force."""
    kinds: dict[str, Mapping[ObjectName, KubeObject]] = {
        Service.__name__: manifests.services,
        Endpoints.__name__: manifests.endpoints,
        EndpointSlice.__name__: manifests.slices,
        Pod.__name__: manifests.pods,
    }
    return kinds.get(kind, {})


def problem_of(
    label: str, message: str, key: Key | None = None, *, severity: Severity = Severity.ERROR
) -> Problem:
    """A problem of a file, or of an object in it."""
    kind, name = (key[0], str(key[1])) if key else ("", "")
    return Problem(file=label, severity=severity, kind=kind, object=name, message=message)
