"""Turns a parsed document into objects: finds the kind, fits the type, validates, makes it canonical."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from proxyd.api.canonical import canonical
from proxyd.api.discovery import Endpoints, EndpointSlice
from proxyd.api.fields import check_fields
from proxyd.api.findings import Findings, Path, clip, field_path, shown
from proxyd.api.meta import ObjectName
from proxyd.api.pod import Pod
from proxyd.api.problems import Problem, Severity
from proxyd.api.rules import Rules
from proxyd.api.service import Service
from proxyd.api.shape import fit
from proxyd.api.validate import KubeObject, validate

__all__ = ["Decoded", "KubeObject", "Rules", "decode"]

_BETA = "discovery.k8s.io/v1beta1"
# The versions that are accepted, the newest one first.
_KINDS: dict[str, tuple[type[KubeObject], tuple[str, ...]]] = {
    "Service": (Service, ("v1",)),
    "Endpoints": (Endpoints, ("v1",)),
    "EndpointSlice": (EndpointSlice, ("discovery.k8s.io/v1", _BETA)),
    "Pod": (Pod, ("v1",)),
}
_LISTS = {"List": "", **{f"{kind}List": kind for kind in _KINDS}}
_VERSIONS = {
    **{kind: versions for kind, (_, versions) in _KINDS.items()},
    **{name: _KINDS[kind][1] if kind else ("v1",) for name, kind in _LISTS.items()},
}
_KNOWN = {name.lower(): name for name in _VERSIONS}


class Decoded(msgspec.Struct, frozen=True, kw_only=True):
    """What a document holds. `objects` are those without an error.

    The `..._places` have an entry for each object, problem or rejected one. It says where in the *document*
    that is, as keys and indexes from the root: ("items", 3, "spec", "ports", 0, "port").
    """

    objects: tuple[KubeObject, ...] = ()
    object_places: tuple[Path, ...] = ()
    problems: tuple[Problem, ...] = ()
    problem_places: tuple[Path, ...] = ()
    # Kinds and names of objects with an error. An earlier good version of one may stay in force.
    rejected: tuple[tuple[str, ObjectName], ...] = ()
    rejected_places: tuple[Path, ...] = ()
    # False: a part of the document may be an object that proxyd uses, and it does not tell which one.
    complete: bool = True


class _Subject(NamedTuple):
    """The kind and name of the object that a problem is about; "" for what cannot be read."""

    kind: str
    name: str


_NOTHING = _Subject("", "")


class _Collector:
    """Builds a Decoded."""

    __slots__ = (
        "complete",
        "object_places",
        "objects",
        "problem_places",
        "problems",
        "rejected",
        "rejected_places",
        "rules",
    )

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.objects: list[KubeObject] = []
        self.object_places: list[Path] = []
        self.problems: list[Problem] = []
        self.problem_places: list[Path] = []
        self.rejected: list[tuple[str, ObjectName]] = []
        self.rejected_places: list[Path] = []
        self.complete = True

    def result(self) -> Decoded:
        return Decoded(
            objects=tuple(self.objects),
            object_places=tuple(self.object_places),
            problems=tuple(self.problems),
            problem_places=tuple(self.problem_places),
            rejected=tuple(self.rejected),
            rejected_places=tuple(self.rejected_places),
            complete=self.complete,
        )

    def unusable(self, subject: _Subject, place: Path, path: Path, message: str) -> None:
        """Report a part of the document that does not tell which object it is."""
        self.complete = False
        self.report(subject, place, path, message)

    def report(
        self,
        subject: _Subject,
        place: Path,
        path: Path,
        message: str,
        severity: Severity = Severity.ERROR,
    ) -> None:
        self.problems.append(
            Problem(
                severity=severity,
                kind=subject.kind,
                object=subject.name,
                path=field_path(path),
                message=message,
            )
        )
        self.problem_places.append(place + path)


def decode(raw: object, rules: Rules) -> Decoded:
    """Decode a parsed document: an object, or a list of objects (`kind: List`, `ServiceList` ...).

    Each object is good or bad by itself. A kind that proxyd does not use is left out with a warning; an
    unknown version of a kind that it uses is an error. The function raises nothing, whatever `raw` is.
    """
    out = _Collector(rules)
    head = _head(raw, (), ("", ""), out)
    if head is not None:
        if head[1] in _LISTS:
            for item, place, inherited in _items(raw, head, out):
                item_head = _head(item, place, inherited, out)
                if item_head is None:
                    continue
                if item_head[1] in _LISTS:
                    out.unusable(
                        _NOTHING, place, ("kind",), "a list inside a list is not read: write its items here"
                    )
                else:
                    _one(item, item_head, place, out)
        else:
            _one(raw, head, (), out)
    return out.result()


def _head(raw: object, place: Path, inherited: tuple[str, str], out: _Collector) -> tuple[str, str] | None:
    """The apiVersion and the kind, if both can be read and proxyd uses the kind."""
    if not isinstance(raw, dict):
        out.unusable(
            _NOTHING, place, (), f"expected an object (a map with apiVersion and kind), got {shown(raw)}"
        )
        return None
    version, kind = raw.get("apiVersion") or inherited[0], raw.get("kind") or inherited[1]
    if isinstance(kind, str) and isinstance(version, str) and version in _VERSIONS.get(kind, ()):
        return version, kind
    subject = _subject(kind, raw)
    for field, value in (("apiVersion", version), ("kind", kind)):
        if not value:
            out.unusable(subject, place, (field,), 'required, as in "apiVersion: v1, kind: Service"')
        elif not isinstance(value, str):
            out.unusable(subject, place, (field,), f"expected a string, got {shown(value)}")
    if not (version and kind and isinstance(version, str) and isinstance(kind, str)):
        return None
    accepted = _VERSIONS.get(kind)
    if accepted is None:
        meant = _KNOWN.get(kind.lower())
        if meant is not None and not _foreign(version, _VERSIONS[meant]):
            out.unusable(subject, place, ("kind",), f"expected {meant}, got {shown(kind)}")
            return None
    elif not _foreign(version, accepted):
        expected = " or ".join(accepted)
        out.report(subject, place, ("apiVersion",), f"expected {expected}, got {shown(version)}")
        _reject(raw, kind, place, out)
        return None
    _ignore(subject, place, kind, version, out)
    return None


def _foreign(version: str, accepted: tuple[str, ...]) -> bool:
    """Whether a version is of another API group: serving.knative.dev/v1 has a Service, too."""
    group, _, _ = version.rpartition("/")
    return "." in group and all(group != ours.rpartition("/")[0] for ours in accepted)


def _ignore(subject: _Subject, place: Path, kind: str, version: str, out: _Collector) -> None:
    message = f"kind {clip(kind)} ({clip(version)}) is not used by proxyd: ignored"
    out.problems.append(
        Problem(severity=Severity.WARNING, kind=subject.kind, object=subject.name, message=message)
    )
    out.problem_places.append((*place, "kind"))


def _subject(kind: object, raw: dict[str, object]) -> _Subject:
    """Kind and name of an object for messages, as far as they can be read."""
    meta = raw.get("metadata")
    name = meta.get("name") if isinstance(meta, dict) else None
    namespace = meta.get("namespace") if isinstance(meta, dict) else None
    texts = [text for text in (namespace, name) if isinstance(text, str) and text]
    if not isinstance(kind, str) or not kind:
        kind = "object"
    elif kind in _KINDS and len(texts) == 1 and texts[0] is name:
        texts.insert(0, "default")
    if not isinstance(name, str) or not name:
        return _Subject(clip(kind), "") if kind != "object" else _NOTHING
    return _Subject(clip(kind), "/".join(map(clip, texts)))


def _items(
    raw: object, head: tuple[str, str], out: _Collector
) -> Iterator[tuple[object, Path, tuple[str, str]]]:
    """Yields each item of a list, its place, and its apiVersion and kind where it gives none."""
    items = raw.get("items") if isinstance(raw, dict) else None
    version, kind = head
    if items is None:
        return
    if not isinstance(items, list | tuple):
        out.unusable(_Subject(kind, ""), (), ("items",), f"expected a list, got {shown(items)}")
        return
    # The items of a ServiceList have neither, as the API server writes it; those of a List have both.
    inherited = (version, _LISTS[kind]) if _LISTS[kind] else ("", "")
    for i, item in enumerate(items):
        yield item, ("items", i), inherited


def _one(raw: object, head: tuple[str, str], place: Path, out: _Collector) -> None:
    assert isinstance(raw, dict)
    version, kind = head
    found = Findings()
    thing = fit(raw, _KINDS[kind][0], found)
    if thing is not None:
        validate(thing, out.rules, found)
    if out.rules.unknown_fields:
        check_fields(raw, _KINDS[kind][0], found)
    if found.found:
        subject = _subject(kind, raw)
        for finding in found.found:
            out.report(subject, place, finding.path, finding.message, finding.severity)
    if thing is None or (found.found and found.errors):
        _reject(raw, kind, place, out)
    else:
        out.objects.append(canonical(thing, beta=version == _BETA))
        out.object_places.append(place)


def _reject(raw: dict[str, object], kind: str, place: Path, out: _Collector) -> None:
    meta = raw.get("metadata")
    name = meta.get("name") if isinstance(meta, dict) else None
    namespace = (meta.get("namespace") if isinstance(meta, dict) else None) or "default"
    if kind in _KINDS and isinstance(name, str) and name and isinstance(namespace, str):
        out.rejected.append((kind, ObjectName(namespace, name)))
        out.rejected_places.append(place)
    else:
        out.complete = False
