"""The fields of the configuration file: which setting each one is, and what becomes of all others."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from proxyd.control.config.durations import parse_duration
from proxyd.control.config.flags import FEATURE_GATES, FLAGS, Flag
from proxyd.control.config.kube_flags import local_mode_warning, mode_warning, verbosity
from proxyd.control.config.values import cluster_cidrs, proxy_mode

API_GROUP = "kubeproxy.config.k8s.io"
API_VERSION = f"{API_GROUP}/v1alpha1"
KIND = "KubeProxyConfiguration"
OWN = "proxyd"

Type = Literal["string", "boolean", "number", "duration", "strings", "map", "levels", "any"]
Path = tuple[str, ...]


class Field(NamedTuple):
    """One field of the file.

    `setting` is the settings field that gets its text; "" if proxyd does not use it. `check` raises
    ValueError. `told` is the warning for a field without setting that has a value; `tells` makes a warning of
    a value, "" for none. In kube-proxy's fields "", false, 0s, [] and {} mean the default, as kubeadm writes
    many of them; with `false_counts` false does not.
    """

    type: Type
    setting: str = ""
    check: Callable[[Any], object] | None = None
    told: str = ""
    tells: Callable[[Any], str] | None = None
    false_counts: bool = False


def _address_with_port(value: str) -> None:
    match = re.fullmatch(r"(?:\[(.*)\]|([^:]*)):(\d+)", value)
    try:
        ipaddress.ip_address((match[1] or match[2]) if match else "")
    except ValueError:
        match = None
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise ValueError(f'expected IP:port with a port from 1 to 65535, got "{value}"')


def _bit(value: int) -> None:
    if not 0 <= value <= 31:
        raise ValueError(f"expected a number from 0 to 31, got {value}")


_NO_IPVS = "proxyd is no IPVS"
_NO_CONNTRACK = "proxyd leaves the kernel's connection tracking as it is"
_NO_INTERFACE = "Pods are told by clusterCIDR, or detectLocalMode NodeCIDR, alone"


def _other_scheduler(value: str) -> str:
    return f"no effect: {_NO_IPVS}; endpoints take turns" if value != "rr" else ""


def _other_than(*defaults: float) -> Callable[[Any], str]:
    """Warns of a value that kube-proxy would set in the kernel's connection tracking; 0 sets nothing."""

    def tells(value: Any) -> str:
        number = parse_duration(value) if isinstance(value, str) else value
        return f"no effect: {_NO_CONNTRACK}" if number not in (0, *defaults) else ""

    return tells


# kubernetes staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go
KUBE_PROXY: dict[Path, Field] = {
    ("bindAddress",): Field("string", "bind_address"),
    ("healthzBindAddress",): Field("string", "healthz_bind_address", _address_with_port),
    ("metricsBindAddress",): Field("string", "metrics_bind_address", _address_with_port),
    ("bindAddressHardFail",): Field("boolean", "bind_address_hard_fail"),
    ("enableProfiling",): Field("boolean", "profiling"),
    ("clusterCIDR",): Field("string", "cluster_cidr", cluster_cidrs),
    ("hostnameOverride",): Field("string", "hostname_override"),
    ("mode",): Field("string", "proxy_mode", proxy_mode, tells=mode_warning),
    ("detectLocalMode",): Field("string", "detect_local_mode", tells=local_mode_warning),
    ("detectLocal", "bridgeInterface"): Field("string", told=_NO_INTERFACE),
    ("detectLocal", "interfaceNamePrefix"): Field("string", told=_NO_INTERFACE),
    ("portRange",): Field("string", told="there are no intermediate ports"),
    ("showHiddenMetricsForVersion",): Field("string"),
    ("clientConnection", "kubeconfig"): Field("string", "kubeconfig"),
    ("clientConnection", "acceptContentTypes"): Field("string"),
    ("clientConnection", "contentType"): Field("string"),
    ("clientConnection", "qps"): Field("number", "kube_api_qps"),
    ("clientConnection", "burst"): Field("number", "kube_api_burst"),
    ("iptables", "masqueradeBit"): Field("number", check=_bit),
    ("iptables", "masqueradeAll"): Field("boolean"),
    ("iptables", "localhostNodePorts"): Field("boolean", "iptables_localhost_nodeports", false_counts=True),
    ("iptables", "syncPeriod"): Field("duration", "sync_period"),
    ("iptables", "minSyncPeriod"): Field("duration", "min_sync_period"),
    ("ipvs", "syncPeriod"): Field("duration"),
    ("ipvs", "minSyncPeriod"): Field("duration"),
    ("ipvs", "scheduler"): Field("string", tells=_other_scheduler),
    ("ipvs", "excludeCIDRs"): Field("strings", told=_NO_IPVS),
    ("ipvs", "strictARP"): Field("boolean", told=_NO_IPVS),
    ("ipvs", "tcpTimeout"): Field("duration", told=_NO_IPVS),
    ("ipvs", "tcpFinTimeout"): Field("duration", told=_NO_IPVS),
    ("ipvs", "udpTimeout"): Field("duration", told=_NO_IPVS),
    ("nftables", "masqueradeBit"): Field("number", check=_bit),
    ("nftables", "masqueradeAll"): Field("boolean"),
    ("nftables", "syncPeriod"): Field("duration"),
    ("nftables", "minSyncPeriod"): Field("duration"),
    ("conntrack", "maxPerCore"): Field("number", tells=_other_than(32768)),
    ("conntrack", "min"): Field("number", tells=_other_than(131072)),
    ("conntrack", "tcpEstablishedTimeout"): Field("duration", tells=_other_than(86400)),
    ("conntrack", "tcpCloseWaitTimeout"): Field("duration", tells=_other_than(3600)),
    ("conntrack", "tcpBeLiberal"): Field("boolean"),
    ("conntrack", "udpTimeout"): Field("duration"),
    ("conntrack", "udpStreamTimeout"): Field("duration"),
    ("oomScoreAdj",): Field("number", "oom_score_adj"),
    ("configSyncPeriod",): Field("duration", "config_sync_period"),
    ("udpIdleTimeout",): Field("duration", "udp_timeout"),
    ("nodePortAddresses",): Field("strings", "nodeport_addresses"),
    ("featureGates",): Field("map", "feature_gates"),
    ("winkernel",): Field("map", told="it is for Windows"),
    ("logging", "format"): Field("string", "log_format"),
    ("logging", "flushFrequency"): Field("any"),  # a duration or nanoseconds
    ("logging", "verbosity"): Field("number", "verbosity"),
    ("logging", "vmodule"): Field("levels", "vmodule"),
    ("logging", "options"): Field("map"),
}
# Periods that must not be longer than the other: (shorter, longer).
ORDERED = [((mode, "minSyncPeriod"), (mode, "syncPeriod")) for mode in ("iptables", "ipvs", "nftables")]

# Settings that kube-proxy's part of the file has, or that a file cannot have.
_ELSEWHERE = {field.setting for field in KUBE_PROXY.values()} | {"config"}
_BY_FIELD = {flag.field: flag for flag in FLAGS}


def own_name(flag: Flag) -> str:
    """The name under `proxyd:` of a flag, as Kubernetes would write it: serviceClusterIPRange."""
    first, *others = flag.name.split("-")
    return first + "".join("IP" if word == "ip" else word.capitalize() for word in others)


# Every setting without a field in kube-proxy's part; and those of the log, which have more values here than
# there.
OWN_FIELDS: dict[str, Flag] = {
    own_name(flag): flag
    for flag in FLAGS
    if flag.field not in _ELSEWHERE or flag.field in {"log_format", "verbosity", "vmodule"}
}


def flag_of(setting: str) -> Flag:
    """The flag of a settings field."""
    return _BY_FIELD[setting]


def own_text(flag: Flag, value: object) -> object:
    """The text for the flag's `parse`, from a value under `proxyd:`.

    Raises:
        ValueError: the value has another type.
    """
    if flag.kind == "switch":
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {_typed(value)}")
        return value
    if isinstance(value, list):
        if not all(isinstance(item, str) for item in value):
            raise ValueError("expected a list of strings")
        return value if flag.kind == "repeat" else ",".join(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        wanted = "a list" if flag.kind == "repeat" else "a string"
        raise ValueError(f"expected {wanted}, got {_typed(value)}")  # noqa: TRY004 - as flags' `parse` does
    return [str(value)] if flag.kind == "repeat" else str(value)


def kube_text(field: Field, value: Any) -> object:
    """The text for the flag's `parse`, from a checked value of a kube-proxy field; None: the default."""
    match field.setting:
        case "feature_gates":
            return [f"{gate}={str(on).lower()}" for gate, on in value.items() if gate in FEATURE_GATES]
        case "log_format":
            # Kubernetes has text, its default, and json.
            return "json" if value == "json" else None
        case "verbosity":
            return verbosity(str(value))
        case "vmodule":
            return ",".join(f"{level['filePattern']}={level['verbosity']}" for level in value)
    return str(value) if field.type == "number" else value


def checked(field: Field, value: Any) -> object:
    """A value of a kube-proxy field; None if it means the default.

    Raises:
        ValueError: it is wrong.
    """
    if value is None or value in ("", [], {}):
        return None
    match field.type:
        case "boolean" if isinstance(value, bool):
            return value if value or field.false_counts else None
        case "number" if isinstance(value, int | float) and not isinstance(value, bool):
            pass
        case "string" | "duration" if isinstance(value, str):
            if field.type == "duration" and not parse_duration(value):
                return None
        case "strings" if isinstance(value, list) and all(isinstance(item, str) for item in value):
            pass
        case "map" if isinstance(value, dict):
            if field.setting and not all(isinstance(on, bool) for on in value.values()):
                raise ValueError("expected a map of names to true or false")
            if not any(value.values()):
                return value if field.setting else None
        case "levels" if isinstance(value, list) and all(
            isinstance(level, dict)
            and isinstance(level.get("filePattern"), str)
            and isinstance(level.get("verbosity"), int)
            for level in value
        ):
            pass
        case "any":
            pass
        case _:
            raise ValueError(f"expected {_ARTICLE[field.type]}, got {_typed(value)}")
    if field.check is not None:
        field.check(value)
    return value


_ARTICLE = {
    "string": "a string",
    "boolean": "true or false",
    "number": "a number",
    "duration": "a duration such as 30s",
    "strings": "a list of strings",
    "map": "a map",
    "levels": "a list of maps with filePattern and verbosity",
    "any": "a value",
}


def _typed(value: object) -> str:
    from proxyd.api.findings import shown  # noqa: PLC0415 - only for a mistake

    return shown(value)
