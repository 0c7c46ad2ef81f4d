"""Objects of a test API server: versions, history, label selectors, as etcd and the watch cache keep them."""

from __future__ import annotations

import bisect
import ipaddress
import json
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

HOSTNAME, ZONE = "kubernetes.io/hostname", "topology.kubernetes.io/zone"
Key = tuple[str, str]  # namespace ("" for Nodes and Namespaces) and name


@dataclass(frozen=True)
class Kind:
    plural: str
    kind: str
    group: str = ""
    versions: tuple[str, ...] = ("v1",)
    namespaced: bool = True

    def api_version(self, version: str) -> str:
        return f"{self.group}/{version}" if self.group else version


KINDS = {
    kind.plural: kind
    for kind in (
        Kind("services", "Service"),
        Kind("endpoints", "Endpoints"),
        Kind("endpointslices", "EndpointSlice", "discovery.k8s.io", ("v1", "v1beta1")),
        Kind("events", "Event"),
        Kind("nodes", "Node", namespaced=False),
        Kind("namespaces", "Namespace", namespaced=False),
    )
}


class Failure(Exception):  # noqa: N818  it is an answer rather than an error
    """An answer that is a Status object."""

    def __init__(self, code: int, reason: str, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.details = code, reason, message, details

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        return status if self.details is None else {**status, "details": self.details}


@dataclass
class Stored:
    """One version of one object; its body has neither kind nor apiVersion."""

    kind: Kind
    body: dict[str, Any]
    rv: int
    _raw: dict[tuple[str, bool], bytes] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        meta = self.body["metadata"]
        return meta.get("namespace", ""), meta["name"]

    @property
    def labels(self) -> dict[str, str]:
        return self.body["metadata"].get("labels") or {}

    def raw(self, version: str, *, typed: bool) -> bytes:
        """JSON in an API version; `typed`: with kind and apiVersion, which items of lists do not have."""
        found = self._raw.get((version, typed))
        if found is None:
            body = to_beta(self.body) if version == "v1beta1" else self.body
            if typed:
                body = {"kind": self.kind.kind, "apiVersion": self.kind.api_version(version), **body}
            found = self._raw[version, typed] = msgspec.json.encode(body)
        return found


@dataclass(frozen=True)
class Change:
    rv: int
    old: Stored | None
    new: Stored | None


def to_beta(body: dict[str, Any]) -> dict[str, Any]:
    """A v1 slice as v1beta1 has it: node and zone are in `topology`."""
    endpoints = []
    for one in body.get("endpoints") or []:
        topology = {**one.get("deprecatedTopology", {})}
        topology |= {HOSTNAME: one["nodeName"]} if one.get("nodeName") else {}
        topology |= {ZONE: one["zone"]} if one.get("zone") else {}
        rest = {k: v for k, v in one.items() if k not in ("nodeName", "zone", "deprecatedTopology")}
        endpoints.append({**rest, "topology": topology} if topology else rest)
    return {**body, "endpoints": endpoints if body.get("endpoints") is not None else None}


def from_beta(body: dict[str, Any]) -> dict[str, Any]:
    endpoints = []
    for one in body.get("endpoints") or []:
        topology = dict(one.get("topology") or {})
        node, zone = topology.pop(HOSTNAME, ""), topology.pop(ZONE, "")
        rest = {k: v for k, v in one.items() if k != "topology"}
        rest |= {"nodeName": node} if node else {}
        rest |= {"zone": zone} if zone else {}
        endpoints.append({**rest, "deprecatedTopology": topology} if topology else rest)
    return {**body, "endpoints": endpoints if body.get("endpoints") is not None else None}


Selector = Callable[[Stored], bool]


def selector(labels: str, fields: str) -> Selector:
    """labelSelector (`a`, `!a`, `a=b`, `a!=b`) and fieldSelector (metadata.name, metadata.namespace)."""
    tests: list[Selector] = []
    for term in filter(None, labels.split(",")):
        if term.startswith("!"):
            tests.append(lambda one, key=term[1:]: key not in one.labels)
        elif "!=" in term:
            key, _, value = term.partition("!=")
            tests.append(lambda one, key=key, value=value: one.labels.get(key) != value)
        elif "=" in term:
            key, _, value = term.replace("==", "=").partition("=")
            tests.append(lambda one, key=key, value=value: one.labels.get(key) == value)
        else:
            tests.append(lambda one, key=term: key in one.labels)
    for term in filter(None, fields.split(",")):
        name, _, value = term.partition("=")
        place = ("metadata.namespace", "metadata.name").index(name)
        tests.append(lambda one, place=place, value=value: one.key[place] == value)
    return lambda one: all(test(one) for test in tests)


class Store:
    """All objects, at their newest version and as they changed since the last compaction.

    Args:
        path: a log that is written through, and read at the start: what etcd is to an API server.
    """

    def __init__(self, path: str = "") -> None:
        self.rv = 100
        self.compacted = 0
        self.objects: dict[str, dict[Key, Stored]] = {plural: {} for plural in KINDS}
        self.history: dict[str, list[Change]] = {plural: [] for plural in KINDS}
        self.watchers: set[Callable[[], None]] = set()
        self._addresses = 256
        self._log = None
        if path:
            if Path(path).exists():
                for line in Path(path).read_bytes().splitlines():
                    op, plural, rv, body = json.loads(line)
                    self.rv = rv - 1
                    self._commit(plural, body, gone=op == "DELETE", rv=rv)
            self._log = Path(path).open("ab", buffering=0)  # noqa: SIM115  it is open as long as the store is

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def get(self, plural: str, key: Key) -> Stored:
        try:
            return self.objects[plural][key]
        except KeyError:
            details = {"name": key[1], "kind": plural}
            raise Failure(404, "NotFound", f'{plural} "{key[1]}" not found', details) from None

    def create(self, plural: str, body: dict[str, Any]) -> Stored:
        body = {k: v for k, v in body.items() if k not in ("kind", "apiVersion")}
        meta = body["metadata"] = {**body.get("metadata", {})}
        if not meta.get("name"):
            meta["name"] = meta.get("generateName", "x-") + uuid.uuid4().hex[:5]
        if KINDS[plural].namespaced:
            meta.setdefault("namespace", "default")
        key = (meta.get("namespace", ""), meta["name"])
        if key in self.objects[plural]:
            details = {"name": key[1], "kind": plural}
            raise Failure(409, "AlreadyExists", f'{plural} "{key[1]}" already exists', details)
        meta["uid"] = str(uuid.uuid4())
        meta["creationTimestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if plural == "services":
            self._default_service(body)
        return self._commit(plural, body)

    def update(self, plural: str, body: dict[str, Any]) -> Stored:
        meta = body["metadata"]
        old = self.get(plural, (meta.get("namespace", "") if KINDS[plural].namespaced else "", meta["name"]))
        given = meta.get("resourceVersion")
        if given and given != str(old.rv):
            message = "the object has been modified; please apply your changes to the latest version"
            raise Failure(409, "Conflict", message)
        kept = {name: old.body["metadata"][name] for name in ("uid", "creationTimestamp")}
        body = {k: v for k, v in body.items() if k not in ("kind", "apiVersion")}
        return self._commit(plural, {**body, "metadata": {**meta, **kept}})

    def patch(self, plural: str, key: Key, patch: dict[str, Any]) -> Stored:
        """A merge patch; what strategic ones have beside that (`$...`) is left out."""
        return self.update(plural, _merged(self.get(plural, key).body, patch))

    def delete(self, plural: str, key: Key) -> Stored:
        return self._commit(plural, self.get(plural, key).body, gone=True)

    def restore(self, plural: str, objects: Iterable[dict[str, Any]]) -> None:
        """Puts in objects as they were recorded, versions and all."""
        for body in objects:
            one = from_beta(body) if plural == "endpointslices" else body
            stored = Stored(KINDS[plural], one, int(one["metadata"]["resourceVersion"]))
            self.objects[plural][stored.key] = stored
            self.rv = max(self.rv, stored.rv)

    def compact(self) -> None:
        """Forgets all history: whoever goes on from a place before this gets 410."""
        self.rv += 1
        self.compacted = self.rv
        for changes in self.history.values():
            changes.clear()

    def since(self, plural: str, rv: int) -> list[Change]:
        """Changes after a version, in order.

        Raises:
            Failure: it is forgotten.
        """
        if rv < self.compacted:
            raise Failure(410, "Expired", f"too old resource version: {rv} ({self.compacted + 1})")
        changes = self.history[plural]
        return changes[bisect.bisect_right(changes, rv, key=lambda change: change.rv) :]

    def bulk(self, services: int, endpoints: int, *, prefix: str = "bulk", slices: bool = True) -> None:
        """Many Services, and endpoints spread over them evenly, each Service with one slice or Endpoints object."""
        each, more = divmod(endpoints, services)
        fields = {"f:spec": {"f:ports": {".": {}, 'k:{"port":80,"protocol":"TCP"}': {".": {}, "f:port": {}}}}}
        managed = [
            {
                "manager": "kubectl-client-side-apply",
                "operation": "Update",
                "apiVersion": "v1",
                "time": "2026-11-22T19:28:35Z",
                "fieldsType": "FieldsV1",
                "fieldsV1": {**fields, "f:metadata": {"f:annotations": {".": {}}, "f:labels": {".": {}}}},
            }
        ]
        applied = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(fields) * 4}
        number = 0
        for i in range(services):
            name, namespace = f"{prefix}-{i}", f"ns-{i % 50}"
            labels = {"app": name, "app.kubernetes.io/managed-by": "bulk"}
            meta = {"name": name, "namespace": namespace, "labels": labels}
            ports = [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}]
            spec = {"ports": ports, "selector": {"app": name}}
            given = {**meta, "managedFields": managed, "annotations": applied}
            self.create("services", {"metadata": given, "spec": spec})
            count = each + (i < more)
            ips = [str(ipaddress.ip_address(0x0A800000 + number + n)) for n in range(count)]
            number += count
            if slices:
                self.create("endpointslices", slice_body(namespace, name, ips, managed=managed))
            else:
                addresses = [{"ip": ip, "nodeName": "node"} for ip in ips]
                ports = [{"name": "http", "port": 8080, "protocol": "TCP"}]
                body = {"metadata": meta, "subsets": [{"addresses": addresses, "ports": ports}]}
                self.create("endpoints", body)

    def _default_service(self, body: dict[str, Any]) -> None:
        spec = body.setdefault("spec", {})
        spec.setdefault("type", "ClusterIP")
        spec.setdefault("sessionAffinity", "None")
        body.setdefault("status", {"loadBalancer": {}})
        for port in spec.get("ports", []):
            port.setdefault("protocol", "TCP")
            port.setdefault("targetPort", port["port"])
        if spec["type"] != "ExternalName" and not spec.get("clusterIP"):
            self._addresses += 1
            spec["clusterIP"] = str(ipaddress.ip_address("10.96.0.0") + self._addresses)

    def _commit(self, plural: str, body: dict[str, Any], *, gone: bool = False, rv: int = 0) -> Stored:
        self.rv = rv or self.rv + 1
        body = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.rv)}}
        stored = Stored(KINDS[plural], body, self.rv)
        old = self.objects[plural].get(stored.key)
        if gone:
            del self.objects[plural][stored.key]
        else:
            self.objects[plural][stored.key] = stored
        # What a DELETED event shows is the last state, with the version of the deletion.
        self.history[plural].append(Change(self.rv, stored if gone else old, None if gone else stored))
        if self._log is not None:
            self._log.write(msgspec.json.encode(["DELETE" if gone else "PUT", plural, self.rv, body]) + b"\n")
        for wake in self.watchers:
            wake()
        return stored


def slice_body(
    namespace: str,
    service: str,
    ips: Iterable[str],
    *,
    suffix: str = "abcde",
    port: int = 8080,
    managed: list[Any] | None = None,
) -> dict[str, Any]:
    """A slice as the controller writes it."""
    meta: dict[str, Any] = {
        "name": f"{service}-{suffix}",
        "namespace": namespace,
        "labels": {
            "kubernetes.io/service-name": service,
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        },
        "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-11-22T19:28:35Z"},
    }
    if managed:
        meta["managedFields"] = managed
    endpoints = [
        {
            "addresses": [ip],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": "node",
            "zone": "za",
            "targetRef": {"kind": "Pod", "namespace": namespace, "name": f"{service}-{ip}", "uid": "0"},
        }
        for ip in ips
    ]
    ports = [{"name": "http", "protocol": "TCP", "port": port}]
    return {"metadata": meta, "addressType": "IPv4", "endpoints": endpoints, "ports": ports}


def _merged(old: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    new = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if name.startswith("$"):
            continue
        if value is None:
            new.pop(name, None)
        else:
            new[name] = _merged(new.get(name), value)
    return new
