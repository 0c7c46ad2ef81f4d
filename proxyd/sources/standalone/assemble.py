"""Assembles a snapshot from manifests: fills in allocations, and turns Pods and Endpoints into slices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import msgspec

from proxyd.api.discovery import EndpointSlice
from proxyd.api.meta import ObjectName
from proxyd.api.problems import Problem, Severity
from proxyd.api.service import Service, ServiceType
from proxyd.sources.manifests.source import ManifestSet
from proxyd.sources.standalone.allocation import (
    NOTHING_TAKEN,
    Allocated,
    Allocations,
    Settings,
    Taken,
    allocate,
)
from proxyd.sources.standalone.endpoints import PodIndex, slices_from_endpoints, slices_from_pods, usable
from proxyd.state.changes import Derived, same_keys, touched
from proxyd.state.snapshot import Snapshot

AssemblySettings: TypeAlias = Settings

_REFUSED = "connections will be refused"


class Assembled(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot, the allocations to keep, and all problems, also the manifests', by file and line."""

    snapshot: Snapshot
    allocations: Allocations
    problems: tuple[Problem, ...] = ()


def assemble(
    manifests: ManifestSet,
    allocations: Allocations,
    settings: Settings,
    now: str,
    taken: Taken = NOTHING_TAKEN,
) -> Assembled:
    """Does what a cluster's controllers do, for objects that no cluster looks after.

    The endpoints of a Service are those of hand-written EndpointSlices that name it (by label, or by having
    its name), of the hand-written Endpoints object of its name, and of the Pods that its selector matches,
    all together. An ExternalName Service has none.

    Args:
        manifests: the objects in force.
        allocations: those that the last call returned, or that were read from the state file.
        settings: the ranges to allocate from.
        now: RFC 3339 with microseconds, UTC.
        taken: what is never allocated.
    """
    return Assembler(settings).assemble(manifests, allocations, now, taken)


class _Remark(NamedTuple):
    """A warning or an error about an object."""

    kind: str
    name: ObjectName
    message: str
    path: str = ""
    severity: Severity = Severity.WARNING


class _Part(NamedTuple):
    """The slices of one Service, and what the user should know of them."""

    slices: tuple[EndpointSlice, ...]
    remarks: tuple[_Remark, ...]


class Assembler:
    """Assembles one state of the manifests after another, with the result of the function `assemble`.

    It computes anew only what depends on objects that are not the same Python objects as in the last state.
    For all others the result has the same Python objects as before.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._manifests = ManifestSet()
        self._allocated = Allocated(services={}, allocations=Allocations())
        self._written: dict[ObjectName, tuple[EndpointSlice, ...]] = {}  # by Service, in order of name
        self._pods = PodIndex({})
        self._remarked: dict[ObjectName, tuple[_Remark, ...]] = {}
        self._orphans: tuple[_Remark, ...] = ()
        self._taken = NOTHING_TAKEN
        self._slices: Derived[ObjectName, tuple[EndpointSlice, ...]] = Derived()
        self._last = Assembled(snapshot=Snapshot(), allocations=Allocations())

    def assemble(
        self, manifests: ManifestSet, allocations: Allocations, now: str, taken: Taken = NOTHING_TAKEN
    ) -> Assembled:
        """As the function `assemble`; what is in `taken` is not allocated."""
        last, self._manifests = self._manifests, manifests
        same_allocations = allocations is self._last.allocations and taken == self._taken
        self._taken = taken
        if manifests is last and same_allocations:
            return self._last
        before = self._allocated.services
        if not (same_allocations and _same_services(last, manifests)):
            self._allocate(manifests, allocations, now)
        services = self._allocated.services
        due = touched(before, services) | touched(last.endpoints, manifests.endpoints)
        regrouped = self._regroup(last, manifests)
        due |= regrouped
        if manifests.pods is not last.pods:
            self._pods = PodIndex(manifests.pods)
            due.update(name for name, service in services.items() if service.spec.selector)
        slices: dict[ObjectName, tuple[EndpointSlice, ...] | None] = {}  # None: it has none any more
        for name in sorted(due):
            service = services.get(name)
            part = self._part(service, manifests) if service is not None else _Part((), ())
            if self._slices.get(name, ()) != part.slices:
                slices[name] = part.slices or None
            if part.remarks:
                self._remarked[name] = part.remarks
            else:
                self._remarked.pop(name, None)
        if (
            any(owner not in manifests.services for owner in regrouped)
            or not same_keys(last.services, manifests.services)
            or not same_keys(last.endpoints, manifests.endpoints)
            or last.rejected != manifests.rejected
        ):
            self._orphans = tuple(self._find_orphans(manifests))
        self._slices = self._slices.derive(slices)
        self._last = Assembled(
            snapshot=Snapshot(services=services, slices=self._slices),
            allocations=self._allocated.allocations,
            problems=self._problems(manifests),
        )
        return self._last

    def _allocate(self, manifests: ManifestSet, allocations: Allocations, now: str) -> None:
        known = self._allocated
        new = allocate(
            manifests.services,
            allocations,
            self._settings,
            now,
            absent=lambda name: not manifests.complete or name in manifests.rejected,
            taken=self._taken,
        )
        # A Service that equals the one of before stays that Python object.
        services = {
            name: earlier if (earlier := known.services.get(name)) == service and earlier else service
            for name, service in new.services.items()
        }
        same = new.allocations == allocations
        self._allocated = Allocated(
            services=services,
            allocations=allocations if same else new.allocations,
            shortages=new.shortages,
        )

    def _regroup(self, last: ManifestSet, manifests: ManifestSet) -> set[ObjectName]:
        """Group hand-written slices by Service. Returns the Services whose slices have changed."""
        moved = touched(last.slices, manifests.slices)
        found: dict[ObjectName, list[EndpointSlice]] = {}
        owners = {
            source[key].service
            for key in moved
            for source in (last.slices, manifests.slices)
            if key in source
        }
        for owner in owners:
            found[owner] = [item for item in self._written.get(owner, ()) if item.metadata.key not in moved]
        for key in moved:
            item = manifests.slices.get(key)
            if item is not None:
                found[item.service].append(item)
        for owner, items in found.items():
            if items:
                self._written[owner] = tuple(sorted(items, key=lambda item: item.metadata.key))
            else:
                self._written.pop(owner, None)
        return owners

    def _part(self, service: Service, manifests: ManifestSet) -> _Part:
        """The slices of one Service, and what the user should know of them."""
        if service.spec.type is ServiceType.EXTERNAL_NAME:
            return _Part((), ())
        name = service.metadata.key
        slices = list(self._written.get(name, ()))
        endpoints = manifests.endpoints.get(name)
        if endpoints:
            slices += slices_from_endpoints(service, endpoints)
        remarks: list[_Remark] = []
        odd = ""
        if service.spec.selector:
            selected = slices_from_pods(service, self._pods)
            slices += selected.slices
            remarks += [_Remark("Pod", pod, "has no status.podIP: left out") for pod in selected.left_out]
            remarks += [
                _Remark("Service", name, f"Pod {pod} has no container port named {target}: left out for it")
                for target, pod in selected.unresolved
            ]
            if not selected.matched and not usable(slices):
                odd = f"no Pod matches its selector: {_REFUSED}"
        if not odd and not any(item.endpoints for item in slices):
            odd = f"no endpoints: {_REFUSED}"
        if not odd and not usable(slices):
            odd = f"no ready endpoints: {_REFUSED}"
        # No client connects to a headless Service through a proxy.
        if odd and not service.spec.headless:
            remarks.append(_Remark("Service", name, odd))
        return _Part(tuple(slices), tuple(remarks))

    def _find_orphans(self, manifests: ManifestSet) -> Iterator[_Remark]:
        """Yields a remark for each Endpoints object and slice whose Service does not exist."""
        known = manifests.services.keys() | manifests.rejected
        for name in sorted(manifests.endpoints.keys() - known):
            yield _Remark("Endpoints", name, f"there is no Service {name}: not used")
        for service in sorted(self._written.keys() - known):
            for item in self._written[service]:
                yield _Remark("EndpointSlice", item.metadata.key, f"there is no Service {service}: not used")

    def _problems(self, manifests: ManifestSet) -> tuple[Problem, ...]:
        """All problems, each with its object's file."""
        shortages = (
            _Remark("Service", name, message, path, Severity.ERROR)
            for name, path, message in self._allocated.shortages
        )
        remarks = (remark for _, some in sorted(self._remarked.items()) for remark in some)
        # Several Services may have the same remark about a Pod.
        told = dict.fromkeys((*shortages, *remarks, *self._orphans))
        problems = (
            *manifests.problems,
            *(
                Problem(
                    file=manifests.origins.get((kind, name), ""),
                    severity=severity,
                    kind=kind,
                    object=str(name),
                    path=path,
                    message=message,
                )
                for kind, name, message, path, severity in told
            ),
        )
        return tuple(sorted(problems, key=lambda p: (p.file, p.line, p.column, p.subject, p.path)))


def _same_services(last: ManifestSet, manifests: ManifestSet) -> bool:
    """Whether allocating again would change nothing, as the same Services are there and absent."""
    return (
        not touched(last.services, manifests.services)
        and last.rejected == manifests.rejected
        and last.complete == manifests.complete
    )
