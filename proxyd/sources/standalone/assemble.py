"""From manifests to a snapshot: allocations filled in, Pods and Endpoints turned into slices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import msgspec

from proxyd.api.discovery import EndpointSlice
from proxyd.api.meta import ObjectName
from proxyd.api.problems import Problem, Severity
from proxyd.api.service import Service, ServiceType
from proxyd.sources.manifests import ManifestSet
from proxyd.sources.standalone.allocation import Allocations, Settings, allocate
from proxyd.sources.standalone.endpoints import PodIndex, slices_from_endpoints, slices_from_pods, usable
from proxyd.state.snapshot import Snapshot

AssemblySettings: TypeAlias = Settings

_REFUSED = "connections will be refused"


class Assembled(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot, the allocations to keep, and what the user should know.

    `problems` are in order of file and line, those of the manifests included.
    """

    snapshot: Snapshot
    allocations: Allocations
    problems: tuple[Problem, ...] = ()


def assemble(manifests: ManifestSet, allocations: Allocations, settings: Settings, now: str) -> Assembled:
    """Does what a cluster's controllers do, for objects that no cluster looks after.

    The endpoints of a Service are all of: the hand-written EndpointSlices that name it (by label, or by having its name),
    the hand-written Endpoints object of its name, and the Pods its selector matches. An ExternalName Service has none.

    Args:
        manifests: what is in force.
        allocations: what the last call returned, or what was read from the state file.
        settings: ranges to allocate from.
        now: RFC 3339 with microseconds, UTC.
    """
    allocated = allocate(
        manifests.services,
        allocations,
        settings,
        now,
        absent=lambda name: not manifests.complete or name in manifests.rejected,
    )
    remarks = _Remarks(manifests)
    written: dict[ObjectName, list[EndpointSlice]] = {}
    for _, item in sorted(manifests.slices.items()):
        written.setdefault(item.service, []).append(item)
    pods = PodIndex(manifests.pods)
    slices = {
        name: found
        for name, service in sorted(allocated.services.items())
        if (found := _slices(service, manifests, written.get(name, []), pods, remarks))
    }
    remarks.orphans(written)
    problems = (
        *manifests.problems,
        *(remarks.placed(problem) for problem in allocated.problems),
        *remarks.problems,
    )
    return Assembled(
        snapshot=Snapshot(services=allocated.services, slices=slices),
        allocations=allocated.allocations,
        problems=tuple(sorted(problems, key=lambda p: (p.file, p.line, p.column, p.subject, p.path))),
    )


def _slices(
    service: Service,
    manifests: ManifestSet,
    written: list[EndpointSlice],
    pods: PodIndex,
    remarks: _Remarks,
) -> tuple[EndpointSlice, ...]:
    """All slices of one Service; what is odd about them is added to `remarks`."""
    if service.spec.type is ServiceType.EXTERNAL_NAME:
        return ()
    slices = list(written)
    endpoints = manifests.endpoints.get(service.metadata.key)
    if endpoints:
        slices += slices_from_endpoints(service, endpoints)
    if service.spec.selector:
        selected = slices_from_pods(service, pods)
        slices += selected.slices
        remarks.pods(service, selected.left_out, selected.unresolved)
        if not selected.matched and not usable(slices):
            remarks.service(service, f"no Pod matches its selector: {_REFUSED}")
            return tuple(slices)
    if not slices or not any(item.endpoints for item in slices):
        remarks.service(service, f"no endpoints: {_REFUSED}")
    elif not usable(slices):
        remarks.service(service, f"no ready endpoints: {_REFUSED}")
    return tuple(slices)


class _Remarks:
    """Collects warnings, each with the file it is about."""

    def __init__(self, manifests: ManifestSet) -> None:
        self.problems: list[Problem] = []
        self._manifests = manifests
        self._pods: set[ObjectName] = set()

    def placed(self, problem: Problem) -> Problem:
        """The problem with the file of its subject."""
        kind, _, name = problem.subject.partition(" ")
        origin = self._manifests.origins.get((kind, ObjectName(*name.split("/", 1))), "")
        return msgspec.structs.replace(problem, file=origin)

    def service(self, service: Service, message: str) -> None:
        # Nothing connects to a headless Service through a proxy.
        if not service.spec.headless:
            self._warn("Service", service.metadata.key, message)

    def pods(
        self,
        service: Service,
        left_out: tuple[ObjectName, ...],
        unresolved: tuple[tuple[str, ObjectName], ...],
    ) -> None:
        for name in left_out:
            if name not in self._pods:
                self._pods.add(name)
                self._warn("Pod", name, "has no status.podIP: left out")
        for target, pod in unresolved:
            self._warn(
                "Service",
                service.metadata.key,
                f"Pod {pod} has no container port named {target}: left out for it",
            )

    def orphans(self, written: Mapping[ObjectName, list[EndpointSlice]]) -> None:
        """Warns of Endpoints and slices whose Service is not there."""
        known = self._manifests.services.keys() | self._manifests.rejected
        for name in sorted(self._manifests.endpoints.keys() - known):
            self._warn("Endpoints", name, f"there is no Service {name}: not used")
        for service in sorted(written.keys() - known):
            for item in written[service]:
                self._warn("EndpointSlice", item.metadata.key, f"there is no Service {service}: not used")

    def _warn(self, kind: str, name: ObjectName, message: str) -> None:
        self.problems.append(
            Problem(
                file=self._manifests.origins.get((kind, name), ""),
                severity=Severity.WARNING,
                subject=f"{kind} {name}",
                message=message,
            )
        )
