"""Flags of kube-proxy (1.19 to 1.34) that proxyd has under other names, or that have no effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from proxyd.control.config import values
from proxyd.control.config.durations import parse_duration, parse_port_range
from proxyd.control.config.feature_gates import gate_warnings
from proxyd.control.config.flag import Flag, Kind
from proxyd.control.config.flags import FLAGS

# The only flags that count for kube-proxy beside --config (cmd/kube-proxy/app/options.go, Complete;
# component-base/logs).
BESIDE_A_FILE = frozenset({"hostname_override", "master", "verbosity", "vmodule", "log_file", "log_format"})

# klog's levels 0 to 3 are for operators; from 4 on they are for whoever looks for a fault.
DEBUG_LEVEL = 4


class Alias(msgspec.Struct, frozen=True, kw_only=True):
    """kube-proxy's name of a setting. `text` turns its value into that of the setting's own flag."""

    name: str
    field: str
    kind: Kind = "value"
    short: str = ""
    metavar: str = "VALUE"
    text: Callable[[str], str] = str


class Foreign(msgspec.Struct, frozen=True, kw_only=True):
    """A flag that has no effect here.

    `check` turns its text into a value, and raises ValueError. If the value is none of `quiet`, there is a
    warning with the text `told`; "" for no warning. `refused`: the flag is an error, and `told` says why.
    """

    name: str
    kind: Literal["value", "repeat", "switch"] = "value"
    metavar: str = ""
    told: str = ""
    quiet: tuple[Any, ...] = ("",)
    check: Callable[[Any], Any] = str
    refused: bool = False


def _log_format(text: str) -> str:
    if text not in {"text", "json", ""}:
        raise ValueError(f'expected text or json, got "{text}"')
    # Text is Kubernetes' default, which here means lines for people on a terminal and JSON elsewhere.
    return "json" if text == "json" else "auto"


def verbosity(text: str) -> str:
    """The text of --verbosity for a level of klog's.

    Raises:
        ValueError: it is not a number.
    """
    return str(int(values.integer(-1, 100)(text) >= DEBUG_LEVEL))


ALIASES: tuple[Alias, ...] = (
    Alias(name="iptables-sync-period", field="sync_period", metavar="DURATION"),
    Alias(name="iptables-min-sync-period", field="min_sync_period", metavar="DURATION"),
    Alias(name="logging-format", field="log_format", metavar="text|json", text=_log_format),
    Alias(name="v", field="verbosity", metavar="N", text=verbosity),
)

_NOT_IPVS = "proxyd is no IPVS"
_NO_CONNTRACK = "proxyd leaves the kernel's connection tracking as it is"
_WINDOWS = "it is for Windows"
_WINDOWS_FLAGS: tuple[tuple[str, Literal["value", "switch"]], ...] = (
    ("windows-service", "switch"),
    ("enable-dsr", "switch"),
    ("forward-healthcheck-vip", "switch"),
    ("network-name", "value"),
    ("source-vip", "value"),
    ("root-hnsendpoint-name", "value"),
    ("windows-priorityclass", "value"),
)


def _duration(text: str) -> float:
    return parse_duration(text)


def _silent(kind: Literal["value", "repeat", "switch"], *names: str) -> Iterator[Foreign]:
    for name in names:
        yield Foreign(name=name, kind=kind, check=values.boolean if kind == "switch" else str)


FOREIGN: tuple[Foreign, ...] = (
    Foreign(
        name="cleanup-ipvs",
        kind="switch",
        check=values.boolean,
        told="proxyd makes no IPVS rules; --cleanup names what is left of kube-proxy's",
        quiet=(),
    ),
    *_silent("value", "kube-api-content-type", "show-hidden-metrics-for-version"),
    *_silent("value", "boot-id-file", "machine-id-file", "azure-container-registry-config"),
    *_silent("value", "cloud-provider-gce-lb-src-cidrs", "cloud-provider-gce-l7lb-src-cidrs"),
    Foreign(
        name="proxy-port-range",
        metavar="PORTS",
        check=lambda text: parse_port_range(text) if text not in {"", "0", "0-0"} else "",
        told="there are no intermediate ports",
    ),
    # It asks for what proxyd does anyway: endpoints see the node's address.
    Foreign(name="masquerade-all", kind="switch", check=values.boolean),
    Foreign(name="iptables-masquerade-bit", metavar="N", check=values.integer(0, 31)),
    Foreign(name="ipvs-sync-period", metavar="DURATION", check=_duration),
    Foreign(name="ipvs-min-sync-period", metavar="DURATION", check=_duration),
    Foreign(
        name="ipvs-scheduler",
        metavar="NAME",
        told=f"{_NOT_IPVS}; endpoints take turns",
        quiet=("", "rr"),
    ),
    Foreign(name="ipvs-exclude-cidrs", kind="repeat", metavar="CIDR[,CIDR...]", told=_NOT_IPVS),
    Foreign(
        name="ipvs-strict-arp",
        kind="switch",
        check=values.boolean,
        told=f"{_NOT_IPVS}; it answers no ARP for VIPs",
        quiet=(False,),
    ),
    *(
        Foreign(
            name=f"ipvs-{what}-timeout", metavar="DURATION", check=_duration, told=_NOT_IPVS, quiet=(0.0,)
        )
        for what in ("tcp", "tcpfin", "udp")
    ),
    *(
        Foreign(name=f"conntrack-{what}", metavar="N", check=check, told=_NO_CONNTRACK, quiet=quiet)
        for what, check, quiet in (
            ("max-per-core", values.integer(0, 1 << 31), (0, 32768)),
            ("min", values.integer(0, 1 << 31), (0, 131072)),
            ("tcp-timeout-established", _duration, (0.0, 86400.0)),
            ("tcp-timeout-close-wait", _duration, (0.0, 3600.0)),
        )
    ),
    Foreign(name="conntrack-tcp-be-liberal", kind="switch", check=values.boolean),
    Foreign(name="conntrack-udp-timeout", metavar="DURATION", check=_duration),
    Foreign(name="conntrack-udp-timeout-stream", metavar="DURATION", check=_duration),
    Foreign(
        name="pod-bridge-interface",
        metavar="NAME",
        told="Pods are told by --cluster-cidr or --detect-local-mode=NodeCIDR alone",
    ),
    Foreign(
        name="pod-interface-name-prefix",
        metavar="NAME",
        told="Pods are told by --cluster-cidr or --detect-local-mode=NodeCIDR alone",
    ),
    # klog's: the log goes to standard error, or to --log-file.
    *_silent(
        "switch", "logtostderr", "alsologtostderr", "skip-headers", "skip-log-headers", "add-dir-header"
    ),
    *_silent("switch", "one-output", "log-json-split-stream", "log-text-split-stream"),
    *_silent("value", "log-dir", "log-file-max-size", "stderrthreshold", "log-backtrace-at"),
    *_silent("value", "log-flush-frequency", "log-json-info-buffer-size", "log-text-info-buffer-size"),
    *(Foreign(name=name, kind=kind, told=_WINDOWS, refused=True) for name, kind in _WINDOWS_FLAGS),
)


def mode_warning(mode: str) -> str:
    """What is said of --proxy-mode; "" where nothing is."""
    return f"proxyd always serves in user space, not by {mode}" if mode not in {"", "userspace"} else ""


def local_mode_warning(mode: str) -> str:
    """What is said of --detect-local-mode; "" where nothing is."""
    by_interface = mode in {"BridgeInterface", "InterfaceNamePrefix"}
    return "Pods are not told by their interfaces; ClusterCIDR is used" if by_interface else ""


def judge(foreign: Mapping[str, Sequence[Any]]) -> tuple[list[str], list[str]]:
    """What is wrong with flags of FOREIGN, and what is said of those that are right.

    Args:
        foreign: the texts given, by flag name.

    Returns:
        Errors and warnings, one line for each flag.
    """
    errors, warnings = [], []
    for flag in FOREIGN:
        texts = foreign.get(flag.name)
        if not texts:
            continue
        if flag.refused:
            errors.append(f"--{flag.name}: {flag.told}; leave it out")
            continue
        try:
            value = [flag.check(text) for text in texts][-1]
        except ValueError as error:
            errors.append(f"--{flag.name}: {error}")
            continue
        if flag.told and value not in flag.quiet:
            warnings.append(f"--{flag.name} has no effect: {flag.told}")
    return errors, warnings


def setting_warnings(given: Mapping[str, Any]) -> list[str]:
    """The warnings about flags that are settings. `given`: valid texts by field."""
    lines = [
        f"--{name}-port is deprecated: --{name}-bind-address takes IP:port"
        for name in ("healthz", "metrics")
        if given.get(f"{name}_port") is not None
    ]
    for field, warning in (("proxy_mode", mode_warning), ("detect_local_mode", local_mode_warning)):
        if told := warning(str(given.get(field) or "").strip()):
            lines.append(f"--{field.replace('_', '-')}: {told}")
    gates = (item.partition("=")[0].strip() for item in values.split(given.get("feature_gates") or ()))
    lines += [f"--feature-gates: {gate}: {told}" for gate, told in gate_warnings(gates)]
    return lines


def shared(flag: Flag) -> bool:
    """Whether kube-proxy has a flag too, under this name or another."""
    return flag.kube or any(alias.field == flag.field for alias in ALIASES)


# The fields of flags that win over a file under kube-proxy's name: those that win there too, and those that
# kube-proxy does not have.
WINNING = BESIDE_A_FILE | {flag.field for flag in FLAGS if not shared(flag)}


def void_beside_a_file(given: Mapping[str, Any]) -> list[str]:
    """The names of the flags that have no effect beside a configuration file, as with kube-proxy.

    Args:
        given: texts by settings field; None if a flag was not given.
    """
    if not given.get("config"):
        return []
    void = {field for field, text in given.items() if text is not None} - WINNING - {"config"}
    return [flag.name for flag in FLAGS if flag.field in void]
