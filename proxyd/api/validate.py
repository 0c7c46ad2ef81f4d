"""Validation of objects, with field paths: proxyd refuses what the Kubernetes API server would refuse."""

from __future__ import annotations

from proxyd.api.discovery import Endpoints, EndpointSlice
from proxyd.api.findings import Findings, shown
from proxyd.api.meta import ObjectMeta
from proxyd.api.names import not_dns1035_label, not_dns1123_label, not_dns1123_subdomain
from proxyd.api.pod import Pod
from proxyd.api.rules import Rules
from proxyd.api.service import Service
from proxyd.api.validate_backends import check_endpoints, check_pod, check_slice
from proxyd.api.validate_service import check_service

KubeObject = Service | Endpoints | EndpointSlice | Pod


def validate(thing: KubeObject, rules: Rules, found: Findings) -> None:
    """Add to `found` every problem of an object."""
    _check_metadata(thing, thing.metadata, found)
    match thing:
        case Service():
            check_service(thing, rules, found)
        case Endpoints():
            check_endpoints(thing, rules, found)
        case EndpointSlice():
            check_slice(thing, rules, found)
        case Pod():
            check_pod(thing, rules, found)


def _check_metadata(thing: KubeObject, meta: ObjectMeta, found: Findings) -> None:
    check, what = (
        (not_dns1035_label, "a service name")
        if isinstance(thing, Service)
        else (not_dns1123_subdomain, "a name")
    )
    if not meta.name:
        found.error(("metadata", "name"), "required")
    elif reason := check(meta.name):
        found.error(("metadata", "name"), f"{shown(meta.name)} is not {what}: {reason}")
    if meta.namespace and (reason := not_dns1123_label(meta.namespace)):
        found.error(("metadata", "namespace"), f"{shown(meta.namespace)} is not a namespace: {reason}")
