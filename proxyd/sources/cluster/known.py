"""The cluster's objects in force: each stays the same Python object until it says something else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from msgspec.structs import replace

from proxyd.api.discovery import Endpoints, EndpointSlice
from proxyd.api.meta import ObjectMeta, ObjectName
from proxyd.api.service import Service
from proxyd.sources.cluster.objects import ClusterObject, Node, same_state
from proxyd.sources.standalone.endpoints import SKIP_MIRROR_LABEL, slices_from_endpoints
from proxyd.state.changes import Derived

T = TypeVar("T", bound=ClusterObject)
Backend = EndpointSlice | Endpoints


class Table(Generic[T]):
    """Objects by name. An object that says the same as the one of before changes nothing."""

    def __init__(self) -> None:
        self.objects: dict[ObjectName, T] = {}

    def put(self, thing: T) -> bool:
        """Take one object. Returns whether it says something new."""
        name = thing.metadata.key
        old = self.objects.get(name)
        if old is not None and same_state(old, thing):
            return False
        self.objects[name] = thing
        return True

    def remove(self, name: ObjectName) -> bool:
        """Forget one object. Returns whether it was known."""
        return self.objects.pop(name, None) is not None

    def replace(self, things: Iterable[T], keep: Iterable[ObjectName]) -> set[ObjectName]:
        """Take a full list.

        Args:
            things: all objects that exist.
            keep: the names of objects that exist too, and stay as they are known.

        Returns:
            The names of objects that are new, different or gone.
        """
        old, self.objects = self.objects, {}
        changed = set()
        for thing in things:
            name = thing.metadata.key
            before = old.get(name)
            if before is not None and same_state(before, thing):
                self.objects[before.metadata.key] = before
            else:
                self.objects[name] = thing
                changed.add(name)
        for name in keep:
            if name in old:
                self.objects.setdefault(name, old[name])
        changed.update(name for name in old if name not in self.objects)
        return changed


class Backends:
    """The slices of each Service, from EndpointSlices or Endpoints objects."""

    def __init__(self) -> None:
        self._owners: dict[ObjectName, ObjectName] = {}  # the Service of each object
        self._members: dict[
            ObjectName, dict[ObjectName, tuple[EndpointSlice, ...]]
        ] = {}  # by Service and object

    def set(self, name: ObjectName, backend: Backend | None) -> set[ObjectName]:
        """Take the newest state of an object; None: it is gone. Returns the Services that changed."""
        touched = set()
        owner = self._owners.pop(name, None)
        if owner is not None:
            touched.add(owner)
            members = self._members[owner]
            del members[name]
            if not members:
                del self._members[owner]
        if backend is not None:
            if isinstance(backend, EndpointSlice):
                owner = backend.service
                made: tuple[EndpointSlice, ...] = (backend,)
            else:
                owner, made = name, mirrored(backend)
            touched.add(owner)
            self._owners[name] = owner
            self._members.setdefault(owner, {})[name] = made
        return touched

    def slices(self, service: ObjectName) -> tuple[EndpointSlice, ...]:
        """All slices of a Service, in order of the names of their objects."""
        members = self._members.get(service)
        if not members:
            return ()
        if len(members) == 1:
            return next(iter(members.values()))
        return tuple(one for _, made in sorted(members.items()) for one in made)


def mirrored(endpoints: Endpoints) -> tuple[EndpointSlice, ...]:
    """The slices that mirror an Endpoints object of a server that has no EndpointSlices.

    The label that tells the mirroring controller to skip the object is ignored: the API server's own
    Endpoints have it.
    """
    meta = endpoints.metadata
    if SKIP_MIRROR_LABEL in meta.labels:
        labels = {key: value for key, value in meta.labels.items() if key != SKIP_MIRROR_LABEL}
        endpoints = replace(endpoints, metadata=replace(meta, labels=labels))
    made = slices_from_endpoints(
        Service(metadata=ObjectMeta(name=meta.name, namespace=meta.namespace)), endpoints
    )
    # An annotation tells when the endpoints changed: for the time it takes until they are in force.
    annotations = meta.annotations
    return tuple(replace(one, metadata=replace(one.metadata, annotations=annotations)) for one in made)


class Known:
    """Services, slices and the node of the cluster, in mappings that are never changed in place.

    `update` copies the mappings that have changed: it should not be called for each change.
    """

    def __init__(self) -> None:
        self.services: Derived[ObjectName, Service] = Derived()
        self.slices: Derived[ObjectName, tuple[EndpointSlice, ...]] = Derived()
        self.node: Node | None = None
        self.service_table: Table[Service] = Table()
        self.backend_table: Table[Backend] = Table()
        self.node_table: Table[Node] = Table()
        self._backends = Backends()
        self._touched_services: set[ObjectName] = set()
        self._touched_backends: set[ObjectName] = set()
        self._touched_node = False

    def touch(self, table: object, names: Iterable[ObjectName]) -> None:
        """Note for the next `update` which objects of a table changed."""
        if table is self.service_table:
            self._touched_services.update(names)
        elif table is self.backend_table:
            self._touched_backends.update(names)
        else:
            self._touched_node = True

    def update(self) -> bool:
        """Bring the mappings up to date. Returns whether anything is different."""
        changed = False
        if self._touched_services:
            services = _apply(
                self.services,
                ((name, self.service_table.objects.get(name)) for name in self._touched_services),
            )
            self._touched_services.clear()
            changed |= services is not self.services
            self.services = services
        if self._touched_backends:
            owners: set[ObjectName] = set()
            for name in self._touched_backends:
                owners |= self._backends.set(name, self.backend_table.objects.get(name))
            self._touched_backends.clear()
            slices = _apply(self.slices, ((owner, self._backends.slices(owner) or None) for owner in owners))
            changed |= slices is not self.slices
            self.slices = slices
        if self._touched_node:
            self._touched_node = False
            node = next(iter(self.node_table.objects.values()), None)
            changed |= node is not self.node
            self.node = node
        return changed


V = TypeVar("V")


def _apply(
    before: Derived[ObjectName, V], entries: Iterable[tuple[ObjectName, V | None]]
) -> Derived[ObjectName, V]:
    """The mapping with these entries; the same Python object if they are in it already."""
    return before.derive({name: value for name, value in entries if before.get(name) is not value})
