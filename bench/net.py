"""The network of a bench: a client, a node and three pods, each a namespace, joined by veth pairs.

    client 10.1.0.2 ---- 10.1.0.1 node 10.244.i.1 ---- 10.244.i.2 pod-i

The node forwards, so that the client reaches pods without a proxy too. The namespaces have no names and are gone with
this process, whatever becomes of it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Self

from tests.support.netlab import Namespace, become_root

__all__ = [
    "HTTP_PORT",
    "IPERF_PORT",
    "OUR_RANGE",
    "PEER_RANGE",
    "PODS",
    "UDP_PORT",
    "Lab",
    "Namespace",
    "become_root",
    "pod_ip",
]

PODS = 3
HTTP_PORT = 8080
IPERF_PORT = 5201
UDP_PORT = 5353
# Every address in it is local to the node, so that a peer can bind it. proxyd has a range that it must route itself.
PEER_RANGE = "10.96"
OUR_RANGE = "10.97"


def pod_ip(number: int) -> str:
    """Address of pod-`number`, from 1."""
    return f"10.244.{number}.2"


class Lab:
    """The namespaces: `client`, `node`, `pods`."""

    def __init__(self) -> None:
        self._cleanup = contextlib.ExitStack()
        try:
            self.client, self.node, *self.pods = (
                self._cleanup.enter_context(Namespace(name))
                for name in ("client", "node", *(f"pod-{number}" for number in range(1, PODS + 1)))
            )
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        self._link("c0", "10.1.0", self.client)
        for number, pod in enumerate(self.pods, 1):
            self._link(f"p{number}", f"10.244.{number}", pod)
        self.node.ip(f"route add local {PEER_RANGE}.0.0/16 dev lo")
        self.node.sysctl(net__ipv4__ip_forward="1")
        # proxyd's health and metrics; a connection to a pod must not get their port.
        self.node.sysctl(net__ipv4__ip_local_reserved_ports="10249,10256")
        for namespace in (self.client, self.node, *self.pods):
            namespace.sysctl(
                net__ipv4__ip_local_port_range="10000\t65000",
                net__ipv4__tcp_tw_reuse="1",
                net__core__somaxconn="4096",
                net__ipv4__tcp_max_syn_backlog="8192",
            )

    def _link(self, name: str, net: str, other: Namespace) -> None:
        self.node.ip(
            f"link add name {name} type veth peer name eth0 netns {other.path}\n"
            f"addr add {net}.1/24 dev {name}\n"
            f"link set {name} up"
        )
        other.ip(f"addr add {net}.2/24 dev eth0\nlink set eth0 up\nroute add default via {net}.1")

    def sockets(self, namespace: Namespace) -> dict[str, int]:
        """Counts of /proc/net/sockstat of a namespace: `inuse` (listening ones too), `tw`; `mem` is the machine's."""
        lines = namespace.call(Path("/proc/thread-self/net/sockstat").read_text).splitlines()
        words = next(line for line in lines if line.startswith("TCP:")).split()[1:]
        return {key: int(value) for key, value in zip(words[::2], words[1::2], strict=True)}

    def close(self) -> None:
        """Leave every namespace."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
