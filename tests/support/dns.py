"""A Service on UDP and TCP for tests through the real program: its manifests, servers in pods, and who asks them."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

from tests.support.manifests import Document
from tests.support.netlab import Namespace, pod_ip, pod_ip6
from tests.support.waiting import wait_for

VIP = "10.96.0.53"
VIP6 = "fd00:96::53"
DNS_PORT = 5353
NODE_PORT = 30053

# Gives everything back, its pod's name where it is asked "who", and nothing for "hush".
_ECHO = """
import socket, sys
sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
sock.bind((sys.argv[3], int(sys.argv[1])))
while True:
    data, peer = sock.recvfrom(65536)
    if data != b"hush":
        sock.sendto(sys.argv[2].encode() if data == b"who" else data, peer)
"""


def dns_service(**spec: object) -> Document:
    """A Service that has the same port on UDP and TCP."""
    ports = [
        {"name": "dns", "port": 53, "targetPort": DNS_PORT, "protocol": "UDP", "nodePort": NODE_PORT},
        {"name": "dns-tcp", "port": 53, "targetPort": DNS_PORT, "protocol": "TCP", "nodePort": NODE_PORT},
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "dns"},
        "spec": {"type": "NodePort", "clusterIP": VIP, "ports": ports, **spec},
    }


def dns_endpoints(*pods: int, v6: bool = False) -> Document:
    ports = [
        {"name": "dns", "port": DNS_PORT, "protocol": "UDP"},
        {"name": "dns-tcp", "port": DNS_PORT, "protocol": "TCP"},
    ]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"dns-{6 if v6 else 4}", "labels": {"kubernetes.io/service-name": "dns"}},
        "addressType": "IPv6" if v6 else "IPv4",
        "endpoints": [{"addresses": [pod_ip6(pod) if v6 else pod_ip(pod)]} for pod in pods],
        "ports": ports,
    }


@contextlib.contextmanager
def programs(*started: subprocess.Popen[bytes]) -> Iterator[None]:
    """These programs, until the end of the block."""
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def echo(pod: Namespace, ip: str = "::", port: int = DNS_PORT) -> subprocess.Popen[bytes]:
    """A server in a pod, once it can be asked."""
    started = pod.popen([sys.executable, "-c", _ECHO, str(port), pod.name, ip])
    wait_for(lambda: listens(pod, port), f"the server in {pod.name}")
    return started


def listens(pod: Namespace, port: int = DNS_PORT) -> bool:
    """Whether a UDP socket is bound to a port."""
    tables = [pod.call(Path(f"/proc/thread-self/net/{name}").read_text) for name in ("udp", "udp6")]
    return any(
        line.split()[1].endswith(f":{port:04X}") for table in tables for line in table.splitlines()[1:]
    )


def ask(host: Namespace, ip: str, port: int = 53, data: bytes = b"who", timeout: float = 10) -> bytes:
    """The answer to one datagram from a new port; it must come from the address that was asked."""
    with host.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        sock.sendto(data, (ip, port))
        try:
            answer, peer = sock.recvfrom(1 << 16)
        except TimeoutError:
            raise TimeoutError(f"{host.name}: no answer from {ip}:{port} to {len(data)} bytes") from None
        assert peer[:2] == (ip, port)
        return answer


def answers(host: Namespace, ip: str, port: int = 53) -> bool:
    with contextlib.suppress(OSError):
        return bool(ask(host, ip, port, timeout=0.3))
    return False


def figures(node: Namespace, name: str = "") -> dict[str, float]:
    """The samples of /metrics whose line has `name` in it."""

    def read() -> str:
        with urlopen("http://127.0.0.1:10249/metrics", timeout=20) as answer:
            return str(answer.read().decode())

    lines = [line for line in node.call(read).splitlines() if name in line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def port_figures(node: Namespace) -> dict[str, float]:
    """The samples of the UDP port of `dns_service`, by name and, where there is one, reason."""
    found = {}
    for sample, value in figures(node, 'service="dns"').items():
        name, _, labels = sample.partition("{")
        if 'protocol="UDP"' in labels and "endpoint=" not in labels:
            reason = re.search(r'reason="(\w+)"', labels)
            found[f"{name}:{reason[1]}" if reason else name] = value
    return found
