"""The values of flags: each function reads a flag's text, and raises ValueError with what was expected."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from proxyd.control.config.durations import parse_duration
from proxyd.state.marks import DEFAULT_MARK

MAX_WORKERS = 16  # the shared counters have room for so many
FEATURE_GATES = {"SCTPSupport": False}
# What 0 means: kubernetes vendor/k8s.io/client-go/rest/config.go.
DEFAULT_QPS, DEFAULT_BURST = 5.0, 10
PROXY_MODES = ("userspace", "iptables", "ipvs", "nftables")
LOCAL_MODES = ("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix")


def split(texts: Sequence[str]) -> list[str]:
    """The items of a repeatable, comma-separated flag."""
    return [item.strip() for text in texts for item in text.split(",") if item.strip()]


def network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """A CIDR without host bits."""
    meant = masked_network(text)
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(f"{text} has host bits set; did you mean {meant}?") from None


def masked_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """A CIDR; host bits do not matter, as in Go."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f'expected a CIDR such as 10.96.0.0/16, got "{text}"') from None


def cluster_ip_range(text: str) -> tuple[str, ...]:
    """One CIDR for services, or one of each family."""
    networks = [network(item) for item in split([text])]
    if not networks or len(networks) > 2:
        raise ValueError(f'expected one CIDR, or an IPv4 and an IPv6 one joined by a comma, got "{text}"')
    if len({found.version for found in networks}) != len(networks):
        raise ValueError("two ranges must be one IPv4 and one IPv6")
    for found in networks:
        if found.num_addresses < 4:
            raise ValueError(f"{found} is too small: it needs at least 4 addresses")
        if found.is_multicast or found.is_unspecified or int(found.network_address) == 0:
            raise ValueError(f"{found} cannot hold service addresses")
    return tuple(str(found) for found in networks)


def cluster_cidrs(text: str) -> tuple[str, ...]:
    """One CIDR of Pods, or one of each family; () for none."""
    try:
        networks = [ipaddress.ip_network(item, strict=False) for item in split([text])]
    except ValueError:
        networks = []
    if text.strip() and (
        len(networks) not in {1, 2} or len({found.version for found in networks}) != len(networks)
    ):
        raise ValueError(f'expected one CIDR, or an IPv4 and an IPv6 one, got "{text}"')
    return tuple(str(found) for found in networks)


def nodeport_addresses(texts: Sequence[str]) -> tuple[str, ...]:
    """CIDRs, or "primary"."""
    items = split(texts)
    if "primary" in items and len(items) > 1:
        raise ValueError('"primary" stands alone: it cannot be combined with CIDRs')
    return tuple(item if item == "primary" else str(masked_network(item)) for item in items)


def address(text: str) -> str:
    """An IP address in canonical form."""
    try:
        return str(ipaddress.ip_address(text.strip()))
    except ValueError:
        raise ValueError(f'expected an IP address, got "{text}"') from None


def workers(text: str) -> int:
    """How many workers."""
    if not text.strip().isdecimal() or int(text) > MAX_WORKERS:
        raise ValueError(f'expected a number from 0 to {MAX_WORKERS}, got "{text}"')
    return int(text)


def one_of(*words: str) -> Callable[[str], str]:
    """A reader of one of these words."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f'expected {", ".join(words[:-1])} or {words[-1]}, got "{text}"')
        return text

    return parse


def mark(text: str) -> int:
    """One bit of a packet's mark, decimal or hexadecimal."""
    try:
        bit = int(text.strip(), 0)
    except ValueError:
        bit = 0
    if bit.bit_count() != 1 or not 0 < bit < 1 << 32:
        raise ValueError(f'expected one bit such as {DEFAULT_MARK:#x}, from 0x1 to 0x80000000, got "{text}"')
    return bit


def boolean(value: str | bool) -> bool:
    """True or false, in all the words of Go's strconv.ParseBool."""
    if isinstance(value, bool):
        return value
    if value in {"1", "t", "T"} or value.lower() == "true":
        return True
    if value in {"0", "f", "F"} or value.lower() == "false":
        return False
    raise ValueError(f'expected true or false, got "{value}"')


def path(text: str) -> str:
    """A path, made absolute."""
    if not text or "\0" in text:
        raise ValueError("expected a path")
    return str(Path(text).absolute())


def socket_path(text: str) -> str:
    """A path that a Unix socket can have."""
    given = path(text)
    if len(os.fsencode(given)) > 107:  # sun_path of unix(7), less its terminating zero
        raise ValueError(
            f"the path of a Unix socket has at most 107 bytes, got {len(os.fsencode(given))}: {given}"
        )
    return given


def paths(texts: Sequence[str]) -> tuple[str, ...]:
    """Paths as they were written, because problems name files in that way."""
    for text in texts:
        path(text)
    return tuple(dict.fromkeys(texts))


def access_log(text: str) -> str:
    """A path, "-" or ""."""
    return text if text in {"", "-"} else path(text)


def log_file(text: str) -> str:
    """A path, or "" for none."""
    return path(text) if text else ""


def node_name(text: str) -> str:
    """The name of a Node: trimmed, lower case (kubernetes pkg/util/node/node.go, GetHostname)."""
    name = text.strip().lower()
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", name):
        raise ValueError(f'expected a node name of a-z, 0-9, "-" and ".", got "{text}"')
    return name


def proxy_name(text: str) -> str:
    """The value of a label."""
    name = text.strip()
    if not re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", name):
        raise ValueError(
            f'expected the value of a label, at most 63 of a-z, 0-9, "-", "_" and ".", got "{text}"'
        )
    return name


def url(text: str) -> str:
    """Where an API server is: a URL, or host:port."""
    given = text.strip()
    scheme, slashes, _ = given.partition("://")
    try:
        parts = urlsplit(given if slashes else f"http://{given}")
        known = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known or (slashes and scheme not in {"http", "https"}) or re.search(r"\s", given):
        raise ValueError(f'expected a URL such as https://10.0.0.1:6443, got "{text}"')
    return given


def feature_gates(texts: Sequence[str]) -> Mapping[str, bool]:
    """The gates that proxyd has. Others are Kubernetes' own; `feature_gates` warns of unknown ones."""
    gates = dict(FEATURE_GATES)
    for item in split(texts):
        name, equals, value = item.partition("=")
        on = boolean(value.strip() if equals else True)
        if name.strip() in FEATURE_GATES:
            gates[name.strip()] = on
    return gates


def bind_address(text: str) -> str:
    """An address, or address:port, in canonical form; "" for none."""
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


def port(text: str) -> int:
    """A port, 0 for none."""
    if not text.strip().isdecimal() or int(text) > 65535:
        raise ValueError(f'expected a port, or 0 for none, got "{text}"')
    return int(text)


def message_size(text: str) -> int:
    """Bytes of an SCTP message; Ki or Mi may follow the number."""
    match = re.fullmatch(r"([0-9]{1,9})(Ki|Mi)?", text.strip())
    size = int(match[1]) * {None: 1, "Ki": 1 << 10, "Mi": 1 << 20}[match[2]] if match else 0
    if not 1024 <= size <= 16 << 20:
        raise ValueError(f'expected bytes from 1Ki to 16Mi, such as 256Ki, got "{text}"')
    return size


def period(text: str) -> float:
    """A duration that is not zero."""
    seconds = parse_duration(text)
    if not seconds:
        raise ValueError(f'expected a duration over 0, got "{text}"')
    return seconds


def integer(low: int, high: int) -> Callable[[str], int]:
    """A reader of whole numbers in a range, both ends included."""

    def parse(text: str) -> int:
        found = re.fullmatch(r"\s*([-+]?\d{1,18})(?:\.0*)?\s*", str(text))
        if found is None or not low <= int(found[1]) <= high:
            raise ValueError(f'expected a whole number from {low} to {high}, got "{text}"')
        return int(found[1])

    return parse


def qps(text: str) -> float:
    """Requests a second; 0 means the default, and a number below 0 no limit."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not -1e9 <= number <= 1e9:  # false for NaN too
        raise ValueError(f'expected a number of requests a second, got "{text}"')
    return number or DEFAULT_QPS


def burst(text: str) -> int:
    """Requests at once; 0 means the default."""
    return integer(0, 1_000_000)(text) or DEFAULT_BURST


def vmodule(text: str) -> tuple[tuple[str, int], ...]:
    """`pattern=N` pairs, comma separated, as klog's --vmodule."""
    found = []
    for item in split([text]):
        pattern, equals, level = item.partition("=")
        if not (pattern and equals and level.isdecimal()):
            raise ValueError(f'expected PATTERN=N[,PATTERN=N...], got "{text}"')
        found.append((pattern, int(level)))
    return tuple(found)


def proxy_mode(text: str) -> str:
    """A mode of kube-proxy's. All of them are served in user space."""
    mode = text.strip()
    if mode == "kernelspace":
        raise ValueError("kernelspace is a mode of Windows; use userspace")
    if mode not in PROXY_MODES:
        raise ValueError(f'expected userspace, iptables, ipvs or nftables, got "{text}"')
    return mode


def local_mode(text: str) -> str:
    """How the cluster's Pods are recognised. The ways by interface are accepted, and have no effect."""
    mode = text.strip()
    if mode not in LOCAL_MODES:
        raise ValueError(f'expected {", ".join(LOCAL_MODES[:-1])} or {LOCAL_MODES[-1]}, got "{text}"')
    return mode


def oom_score(text: str) -> int:
    """A number that /proc/PID/oom_score_adj accepts."""
    return integer(-1000, 1000)(text)
