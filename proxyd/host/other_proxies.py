"""Finds the other proxy of this node that holds an address of proxyd's, by HTTP and by asking the kernel."""

from __future__ import annotations

import http.client
import json
import re

import msgspec

from proxyd.api.service import Protocol
from proxyd.host.holders import holder
from proxyd.state.spec import ListenerKey

_TIMEOUT = 1.0  # seconds for one answer
_MAX_BODY = 4096
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_MODES = {"userspace", "iptables", "ipvs", "nftables", "kernelspace"}


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """The holder of an address.

    Attributes:
        kind: "kube-proxy" or "proxyd", as it answers; "" for anything else.
        mode: the mode of a kube-proxy, if it tells.
        process: its name and pid; "" if they can't be read.
    """

    kind: str
    mode: str = ""
    process: str = ""

    def __str__(self) -> str:
        told = f" ({self.process})" if self.process else ", whose process can't be seen from here"
        if self.kind == "proxyd":
            return f"another proxyd{told}"
        if self.kind:
            return f"kube-proxy{f' in {self.mode} mode' if self.mode else ''}{told}"
        return self.process or "another process"


def neighbour(address: tuple[str, int]) -> Neighbour | None:
    """The process that listens at an address; None if none does. It takes seconds if that does not answer."""
    ip, port = address
    process = str(holder(ListenerKey(ip, port, Protocol.TCP), patient=True))
    host = _ANY.get(ip, ip)
    mode = _get(host, port, "/proxyMode")
    if mode is None:
        return (
            Neighbour(kind="kube-proxy" if _named_so(process) else "", process=process) if process else None
        )
    server, code, body = mode
    if server.startswith("proxyd/"):
        return Neighbour(kind="proxyd", process=process)
    if code == 200 and body.strip() in _MODES:
        return Neighbour(kind="kube-proxy", mode=body.strip(), process=process)
    health = _get(host, port, "/healthz")
    if _named_so(process) or (health is not None and _is_health(health[2])):
        return Neighbour(kind="kube-proxy", process=process)
    return Neighbour(kind="", process=process)


def _get(host: str, port: int, path: str) -> tuple[str, int, str] | None:
    """The Server header, status and body of an answer; None if there is none, or not in HTTP."""
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return (
            response.getheader("Server", ""),
            response.status,
            response.read(_MAX_BODY).decode("utf-8", "replace"),
        )
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _is_health(body: str) -> bool:
    """Whether kube-proxy's health server answers like this (pkg/proxy/healthcheck/proxier_health.go)."""
    try:
        answer = json.loads(body)
    except ValueError:
        return False
    return isinstance(answer, dict) and {"lastUpdated", "currentTime"} <= answer.keys()


def _named_so(process: str) -> bool:
    return bool(re.match(r"(hyperkube|kube-proxy)\b", process))
