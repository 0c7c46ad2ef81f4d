"""Finds mistyped fields: those that no Kubernetes object has, and that look like one that it has."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from msgspec import inspect

from proxyd.api.findings import Findings, Path, clip
from proxyd.api.shape import shape_of

# A field this similar is probably meant: in a word of five letters one may differ, or two be swapped.
_CLOSE = 0.75
# Longer names are not compared, which would take long.
_LONGEST = 60

# The fields of the Kubernetes API, up to 1.34, that the structs here leave out: they are not mistyped.
_UNUSED = {
    "Service": ("apiVersion", "kind"),
    "Endpoints": ("apiVersion", "kind"),
    "EndpointSlice": ("apiVersion", "kind"),
    "Pod": ("apiVersion", "kind"),
    "ObjectMeta": (
        *("clusterName", "deletionGracePeriodSeconds", "finalizers", "generateName", "generation"),
        *("managedFields", "ownerReferences", "selfLink"),
    ),
    "ServiceSpec": ("topologyKeys", "trafficDistribution", "ipFamily", "loadBalancerClass"),
    "ServiceStatus": ("conditions",),
    "LoadBalancerIngress": ("ports",),
    "ObjectReference": ("apiVersion", "fieldPath", "resourceVersion", "uid"),
    "EndpointPort": ("appProtocol",),
    "SliceEndpoint": ("deprecatedTopology", "hostname"),
    "EndpointAddress": ("hostname",),
    "PodSpec": (
        *("activeDeadlineSeconds", "affinity", "automountServiceAccountToken", "dnsConfig", "dnsPolicy"),
        *("enableServiceLinks", "ephemeralContainers", "hostAliases", "hostIPC", "hostNetwork", "hostPID"),
        *("hostUsers", "hostnameOverride", "imagePullSecrets", "initContainers", "nodeSelector", "os"),
        *("overhead", "preemptionPolicy", "priority", "priorityClassName", "readinessGates"),
        *("resourceClaims", "resources", "restartPolicy", "runtimeClassName", "schedulerName"),
        *("schedulingGates", "securityContext", "serviceAccount", "serviceAccountName"),
        *("setHostnameAsFQDN", "shareProcessNamespace", "subdomain", "terminationGracePeriodSeconds"),
        *("tolerations", "topologySpreadConstraints", "volumes"),
    ),
    "Container": (
        *("args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "livenessProbe"),
        *("readinessProbe", "resizePolicy", "resources", "restartPolicy", "restartPolicyRules"),
        *("securityContext", "startupProbe", "stdin", "stdinOnce", "terminationMessagePath"),
        *("terminationMessagePolicy", "tty", "volumeDevices", "volumeMounts", "workingDir"),
    ),
    "ContainerPort": ("hostIP", "hostPort"),
    "PodCondition": ("lastProbeTime", "lastTransitionTime", "message", "observedGeneration", "reason"),
    "PodStatus": (
        *("containerStatuses", "ephemeralContainerStatuses", "extendedResourceClaimStatus", "hostIP"),
        *("hostIPs", "initContainerStatuses", "message", "nominatedNodeName", "observedGeneration"),
        *("qosClass", "reason", "resize", "resourceClaimStatuses", "startTime"),
    ),
}  # fmt: skip


def check_fields(raw: object, kind: type, found: Findings) -> None:
    """Add to `found` a warning for each field of a document that is probably mistyped.

    A field that looks like no known one gets none: a newer Kubernetes may have it.
    """
    for path, name, meant in _unknown(raw, shape_of(kind), ()):
        found.warning((*path, name), f'unknown field "{clip(name)}": did you mean {meant}?')


def _unknown(value: object, shape: inspect.Type, path: Path) -> Iterator[tuple[Path, str, str]]:
    match shape:
        case inspect.StructType() if isinstance(value, dict):
            fields = {field.encode_name: field.type for field in shape.fields}
            known = (*fields, *_UNUSED.get(shape.cls.__name__, ()))
            for name, item in value.items():
                if name in fields:
                    yield from _unknown(item, fields[name], (*path, name))
                elif name not in known and (meant := _meant(name, known)):
                    yield path, name, meant
        case inspect.VarTupleType() if isinstance(value, list | tuple):
            for i, item in enumerate(value):
                yield from _unknown(item, shape.item_type, (*path, i))
        case inspect.UnionType():
            for member in shape.types:
                if isinstance(member, inspect.StructType):
                    yield from _unknown(value, member, path)
        case _:
            pass


def _meant(name: str, known: tuple[str, ...]) -> str:
    """The known field that a name looks like; "" if there is none."""
    plain = {_plain(one): one for one in known}
    if _plain(name) in plain:
        return plain[_plain(name)]
    if len(name) > _LONGEST:
        return ""
    close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=_CLOSE)
    return plain[close[0]] if close else ""


def _plain(name: str) -> str:
    """A name in lower case, without dashes and underscores."""
    return name.replace("_", "").replace("-", "").lower()
