"""The flags of `proxyd run`: what each is called, what it means, and how its text is read."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from proxyd.control.durations import parse_duration, parse_port_range

MAX_WORKERS = 16  # as many as the shared counters have room for
FEATURE_GATES = {"SCTPSupport": False}


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """One flag of `proxyd run`.

    `parse` turns its text, or the list of its texts where it is repeatable, into the field's value and raises
    ValueError with what was expected. `default` is what the help says.
    """

    name: str
    metavar: str
    help: str
    default: str
    parse: Callable[[Any], Any]
    kind: Literal["value", "repeat", "switch", "count"] = "value"
    short: str = ""

    @property
    def field(self) -> str:
        """The name of the settings field."""
        return self.name.replace("-", "_")


def _split(texts: Sequence[str]) -> list[str]:
    """The items of a repeatable, comma-separated flag."""
    return [item.strip() for text in texts for item in text.split(",") if item.strip()]


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f'expected a CIDR such as 10.96.0.0/16, got "{text}"') from None
    raise ValueError(f"{text} has host bits set; did you mean {meant}?")


def _cluster_ip_range(text: str) -> tuple[str, ...]:
    networks = [_network(item) for item in _split([text])]
    if not networks or len(networks) > 2:
        raise ValueError(f'expected one CIDR, or an IPv4 and an IPv6 one joined by a comma, got "{text}"')
    if len({network.version for network in networks}) != len(networks):
        raise ValueError("two ranges must be one IPv4 and one IPv6")
    for network in networks:
        if network.num_addresses < 4:
            raise ValueError(f"{network} is too small: it needs at least 4 addresses")
        if network.is_multicast or network.is_unspecified or int(network.network_address) == 0:
            raise ValueError(f"{network} cannot hold service addresses")
    return tuple(str(network) for network in networks)


def _nodeport_addresses(texts: Sequence[str]) -> tuple[str, ...]:
    items = _split(texts)
    if "primary" in items and len(items) > 1:
        raise ValueError('"primary" stands alone: it cannot be combined with CIDRs')
    return tuple(item if item == "primary" else str(_network(item)) for item in items)


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text.strip()))
    except ValueError:
        raise ValueError(f'expected an IP address, got "{text}"') from None


def _workers(text: str) -> int:
    if not text.strip().isdecimal() or int(text) > MAX_WORKERS:
        raise ValueError(f'expected a number from 0 to {MAX_WORKERS}, got "{text}"')
    return int(text)


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f'expected {", ".join(words[:-1])} or {words[-1]}, got "{text}"')
        return text

    return parse


def _boolean(value: str | bool) -> bool:
    if isinstance(value, bool):
        return value
    if value.lower() not in {"true", "false"}:
        raise ValueError(f'expected true or false, got "{value}"')
    return value.lower() == "true"


def _udp_timeout(text: str) -> float:
    seconds = parse_duration(text)
    if not seconds:
        raise ValueError(f'expected a duration over 0, got "{text}"')
    return seconds


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("expected a path")
    return str(Path(text).absolute())


def _socket_path(text: str) -> str:
    path = _path(text)
    if len(os.fsencode(path)) > 107:  # sun_path of unix(7), less its terminating zero
        raise ValueError(
            f"the path of a Unix socket has at most 107 bytes, got {len(os.fsencode(path))}: {path}"
        )
    return path


def _paths(texts: Sequence[str]) -> tuple[str, ...]:
    # As they were written: that is how problems name their files.
    for text in texts:
        _path(text)
    return tuple(dict.fromkeys(texts))


def _access_log(text: str) -> str:
    return text if text in {"", "-"} else _path(text)


def _node_name(text: str) -> str:
    name = text.strip().lower()
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", name):
        raise ValueError(f'expected a node name of a-z, 0-9, "-" and ".", got "{text}"')
    return name


def _feature_gates(texts: Sequence[str]) -> Mapping[str, bool]:
    gates = dict(FEATURE_GATES)
    for item in _split(texts):
        name, equals, value = item.partition("=")
        if name not in FEATURE_GATES:
            raise ValueError(f'unknown feature gate "{name}"; there is {", ".join(FEATURE_GATES)}')
        gates[name] = _boolean(value if equals else True)
    return gates


def _bind_address(text: str) -> str:
    """Off (an empty text), an address, or address:port, in canonical form."""
    given = text.strip()
    if not given:
        return ""
    host, port = given, ""
    if given.startswith("["):
        host, bracket, rest = given[1:].partition("]")
        port = rest.removeprefix(":")
        wrong = not bracket or (bool(rest) and (not rest.startswith(":") or not port))
    elif given.count(":") == 1:
        host, _, port = given.partition(":")
        wrong = not port
    else:
        wrong = False
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        wrong = True
    if wrong or (port and (not port.isdecimal() or int(port) > 65535)):
        raise ValueError(f'expected IP:port such as 127.0.0.1:10249, or "" for none, got "{text}"')
    shown = f"[{ip}]" if ip.version == 6 else str(ip)
    return f"{shown}:{int(port)}" if port else str(ip)


def _port(text: str) -> int:
    if not text.strip().isdecimal() or int(text) > 65535:
        raise ValueError(f'expected a port, or 0 for none, got "{text}"')
    return int(text)


def _period(text: str) -> float:
    seconds = parse_duration(text)
    if not seconds:
        raise ValueError("expected a duration greater than 0")
    return seconds


FLAGS: tuple[Flag, ...] = (
    Flag(
        name="manifests",
        metavar="PATH",
        kind="repeat",
        parse=_paths,
        default="none",
        help="file or folder of Services, Endpoints, EndpointSlices and Pods to serve; repeatable; required",
    ),
    Flag(
        name="service-cluster-ip-range",
        metavar="CIDR[,CIDR]",
        parse=_cluster_ip_range,
        default="10.96.0.0/16 with CAP_NET_ADMIN, else 127.96.0.0/16",
        help="range that clusterIPs are taken from where a Service gives none; one, or one IPv4 and one IPv6",
    ),
    Flag(
        name="service-node-port-range",
        metavar="PORTS",
        parse=parse_port_range,
        default="30000-32767",
        help="range of NodePorts, as FIRST-LAST or FIRST+MORE",
    ),
    Flag(
        name="vip-mode",
        metavar="MODE",
        parse=_one_of("auto", "route", "bind", "loopback", "none"),
        default="auto",
        help="how VIPs become reachable: auto (route if allowed, else bind what is local), route, bind, "
        "loopback (a.b.c.d is served at 127.b.c.d) or none (NodePorts and externalIPs only)",
    ),
    Flag(
        name="external-ip-mode",
        metavar="MODE",
        parse=_one_of("steer", "none"),
        default="steer",
        help="externalIPs that are not the node's own: steer (policy rules take their service ports) or none",
    ),
    Flag(
        name="nodeport-addresses",
        metavar="CIDR[,CIDR...]",
        kind="repeat",
        parse=_nodeport_addresses,
        default="all",
        help='node addresses that NodePorts are opened on: CIDRs, or "primary"; repeatable',
    ),
    Flag(
        name="bind-address",
        metavar="IP",
        parse=_address,
        default="0.0.0.0",
        help="the one node address that NodePorts are opened on; 0.0.0.0 or :: for all",
    ),
    Flag(
        name="workers",
        metavar="N",
        parse=_workers,
        default="one per CPU, at most 4",
        help=f"data-plane processes, 0 to {MAX_WORKERS}; 0 relays inside the control process",
    ),
    Flag(
        name="drain-timeout",
        metavar="DURATION",
        parse=parse_duration,
        default="25s",
        help="how long connections may go on after SIGTERM or after their Service was removed; 0 ends them at once",
    ),
    Flag(
        name="tcp-idle-timeout",
        metavar="DURATION",
        parse=parse_duration,
        default="0s",
        help="end TCP connections that carried nothing for so long; 0 never",
    ),
    Flag(
        name="udp-timeout",
        metavar="DURATION",
        parse=_udp_timeout,
        default="60s",
        help="end UDP flows that carried nothing for so long, after their first reply; "
        "annotation proxyd.io/udp-idle-timeout says otherwise for one Service",
    ),
    Flag(
        name="access-log",
        metavar="PATH",
        parse=_access_log,
        default="none",
        help='file that gets a line for every finished connection; "-" for standard output',
    ),
    Flag(
        name="admin-socket",
        metavar="PATH",
        parse=_socket_path,
        default="/run/proxyd/admin.sock as root, else $XDG_RUNTIME_DIR/proxyd/admin.sock",
        help="Unix socket that `proxyd get` and `proxyd status` ask",
    ),
    Flag(
        name="state-file",
        metavar="PATH",
        parse=_path,
        default="/var/lib/proxyd/state.json as root, else ~/.local/state/proxyd/state.json",
        help="file that remembers allocated clusterIPs and NodePorts across restarts",
    ),
    Flag(
        name="allow-loopback-endpoints",
        metavar="true|false",
        kind="switch",
        parse=_boolean,
        default="false",
        help="accept endpoints in 127.0.0.0/8 and ::1, for local testing",
    ),
    Flag(
        name="log-format",
        metavar="FORMAT",
        parse=_one_of("auto", "console", "json"),
        default="auto",
        help="console, json, or auto: console on a terminal and json elsewhere",
    ),
    Flag(
        name="verbosity",
        short="v",
        metavar="N",
        kind="count",
        parse=int,
        default="0",
        help="more in the log: -v for debug",
    ),
    Flag(
        name="hostname-override",
        metavar="NAME",
        parse=_node_name,
        default="the host name, in lower case",
        help="name of this node, as endpoints carry it",
    ),
    Flag(
        name="feature-gates",
        metavar="NAME=BOOL[,...]",
        kind="repeat",
        parse=_feature_gates,
        default=",".join(f"{name}={str(on).lower()}" for name, on in FEATURE_GATES.items()),
        help="features that are off until asked for; repeatable",
    ),
    Flag(
        name="config",
        metavar="FILE",
        parse=_path,
        default="none",
        help="KubeProxyConfiguration file, with proxyd's own settings under proxyd:; flags win over it",
    ),
    Flag(
        name="healthz-bind-address",
        metavar="IP[:PORT]",
        parse=_bind_address,
        default="0.0.0.0:10256",
        help='where /healthz and /livez are answered; "" for nowhere',
    ),
    Flag(
        name="metrics-bind-address",
        metavar="IP[:PORT]",
        parse=_bind_address,
        default="127.0.0.1:10249",
        help='where /metrics, /proxyMode and /configz are answered; "" for nowhere',
    ),
    Flag(
        name="healthz-port",
        metavar="PORT",
        parse=_port,
        default="10256",
        help="port of --healthz-bind-address where it names none; 0 answers nowhere",
    ),
    Flag(
        name="metrics-port",
        metavar="PORT",
        parse=_port,
        default="10249",
        help="port of --metrics-bind-address where it names none; 0 answers nowhere",
    ),
    Flag(
        name="bind-address-hard-fail",
        metavar="true|false",
        kind="switch",
        parse=_boolean,
        default="false",
        help="end when the health or metrics address is taken; else it is tried again every 5 s",
    ),
    Flag(
        name="metrics-endpoints",
        metavar="true|false",
        kind="switch",
        parse=_boolean,
        default="true",
        help="metrics for every endpoint, of the first 10,000; false leaves those of service ports",
    ),
    Flag(
        name="sync-period",
        metavar="DURATION",
        parse=_period,
        default="30s",
        help="how often routes and rules are compared with the kernel's; a change older than two of them is unhealthy",
    ),
)
