"""The metadata of every Kubernetes object."""

from __future__ import annotations

import msgspec


class ObjectName(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Namespace and name of an object; reads as `namespace/name`."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class ObjectMeta(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The parts of `metadata` that proxyd uses; all else is ignored."""

    name: str = ""
    namespace: str = "default"
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    # RFC 3339. The API server sets it; the standalone controller sets it for manifests. It orders conflicts.
    creation_timestamp: str = ""
    deletion_timestamp: str = ""
    resource_version: str = ""
    uid: str = ""

    @property
    def key(self) -> ObjectName:
        """Namespace and name."""
        return ObjectName(self.namespace, self.name)
