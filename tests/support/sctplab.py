"""The lab for SCTP: the node with proxyd, two pods, a client, an outside host, and a second path between all of them.

    client 10.244.0.100 ---- cbr0 10.244.0.1 \\         / cbr0 ---- pod-1 10.244.0.11, pod-2 10.244.0.12
    client 10.245.0.100 ---- cbr1 10.245.0.1 -- node ---- cbr1 ---- pod-1 10.245.0.11, pod-2 10.245.0.12

Building it and starting proxyd takes seconds in a machine that is emulated, so all tests share both; each has Services of
its own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tests.support import sctp_probe
from tests.support.daemon import Proxyd, resident_kib
from tests.support.manifests import Document, write
from tests.support.netlab import Lab, Namespace, pod_ip, pod_ip6
from tests.support.sctp_probe import Association, Echo, Message, Server
from tests.support.waiting import wait_for

PORT = 3868
CLIENT_IP, CLIENT_IP_2 = "10.244.0.100", "10.245.0.100"
NODE_IP_2 = "10.245.0.1"


def second_ip(number: int) -> str:
    """Address of pod-`number` on the second path."""
    return f"10.245.0.{10 + number}"


class SctpLab:
    """Namespaces and a daemon that lasts; `service` makes Services. Leaving the `with` block ends all of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifests = folder / "manifests"
        self.manifests.mkdir()
        self.lab = Lab(pods=2, ipv6=True)
        self._numbers = itertools.count(1)
        self._services: list[Service] = []
        self._daemon: Proxyd | None = None
        try:
            self._add_second_path()
        except BaseException:
            self.lab.close()
            raise

    def _add_second_path(self) -> None:
        lab = self.lab
        script = ["link add name cbr1 type bridge", f"addr add {NODE_IP_2}/24 dev cbr1", "link set cbr1 up"]
        hosts = [
            *((pod, second_ip(number)) for number, pod in enumerate(lab.pods, 1)),
            (lab.client, CLIENT_IP_2),
        ]
        for number, (host, _) in enumerate(hosts):
            script += [
                f"link add name second{number} type veth peer name eth1 netns {host.path}",
                f"link set second{number} master cbr1 up",
            ]
        lab.node.ip("\n".join(script))
        for host, ip in hosts:
            host.ip(f"addr add {ip}/24 dev eth1\nlink set eth1 up")

    @cached_property
    def proxyd(self) -> Proxyd:
        """The daemon, from its first use on."""
        access_log = str(self.folder / "access.log")
        flags = ("--feature-gates=SCTPSupport=true", "--access-log", access_log)
        self._daemon = Proxyd(self.lab.node, self.folder, self.manifests, flags=flags)
        return self._daemon.start()

    def worker(self) -> int:
        """Pid of its only worker."""
        return wait_for(self.proxyd.worker_pids, "a worker")[0]

    # Services

    def service(
        self,
        *servers: Server | tuple[str, int],
        annotations: dict[str, str] | None = None,
        further: dict[str, str] | None = None,
        vip: str | None = None,
        **spec: Any,
    ) -> Service:
        """A Service before these servers (or addresses), served when this returns.

        Args:
            servers: the endpoints, all with the same port.
            annotations: of the Service.
            further: of its Endpoints; more annotations.
            vip: clusterIP; one that nobody else has where none is given.
            **spec: more of the Service's spec, or of its port: `nodePort`.
        """
        number = next(self._numbers)
        made = Service(self, f"sctp-{number}", vip or f"10.96.1.{number}")
        self._services.append(made)
        made.write(*servers, annotations=annotations, further=further, **spec)
        made.wait("Serving" if servers else "NoEndpoints")
        return made

    def remove_services(self) -> None:
        """Remove all Services."""
        for service in self._services:
            service.remove()
        self._services.clear()

    def log(self) -> str:
        """What the daemon has logged."""
        if self._daemon is None or not self._daemon.log_file.exists():  # it is gone with the test's folder
            return ""
        return self._daemon.log()

    def close(self) -> None:
        """End everything."""
        if self._daemon is not None:
            self._daemon.__exit__()
        self.lab.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Service:
    """A Service of a test."""

    def __init__(self, lab: SctpLab, name: str, vip: str) -> None:
        self._lab = lab
        self.name = name
        self.vip = vip
        self._file = lab.manifests / f"{name}.yaml"

    def write(
        self,
        *servers: Server | tuple[str, int],
        annotations: dict[str, str] | None = None,
        further: dict[str, str] | None = None,
        **spec: Any,
    ) -> None:
        """Write the manifest, anew where it is there already."""
        where = [(one.ip, one.port) if isinstance(one, Server) else one for one in servers]
        port: Document = {"port": PORT, "protocol": "SCTP"}
        if "nodePort" in spec:
            port["nodePort"] = spec.pop("nodePort")
            spec["type"] = "NodePort"
        service: Document = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "annotations": annotations or {}},
            "spec": {"clusterIP": self.vip, "ports": [port], **spec},
        }
        slices = [self._slice(family, where, further or {}) for family in ("IPv4", "IPv6")]
        write(self._file, service, *slices)

    def _slice(self, family: str, where: Sequence[tuple[str, int]], annotations: dict[str, str]) -> Document:
        addresses = [(ip, port) for ip, port in where if (":" in ip) == (family == "IPv6")]
        ports = {port for _, port in addresses}
        assert len(ports) <= 1, "the endpoints of an EndpointSlice have one port"
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{self.name}-{family.lower()}",
                "labels": {"kubernetes.io/service-name": self.name},
                "annotations": annotations,
            },
            "addressType": family,
            "endpoints": [{"addresses": [ip]} for ip, _ in addresses],
            "ports": [{"name": "", "port": port, "protocol": "SCTP"} for port in ports],
        }

    def wait(self, state: str) -> None:
        """Wait until its listener has this state."""
        self._lab.proxyd.wait_listener(self.vip, PORT, state)

    def remove(self) -> None:
        """Delete the manifest."""
        self._file.unlink(missing_ok=True)

    def connect(
        self, namespace: Namespace | None = None, ip: str | None = None, **options: Any
    ) -> Association:
        """A client's association to it; `options` as those of `sctp_probe.connect`."""
        return sctp_probe.connect(namespace or self._lab.lab.client, ip or self.vip, PORT, **options)

    # What the daemon says

    def listeners(self) -> list[dict[str, Any]]:
        """`proxyd get listeners -o json`, of this Service."""
        return [one for one in self._lab.proxyd.get("listeners") if one["name"] == self.name]

    def connections(self) -> list[dict[str, Any]]:
        """`proxyd get connections -o json`, of this Service."""
        return [one for one in self._lab.proxyd.get("connections") if one["name"] == self.name]

    def wait_ended(self) -> None:
        """Wait until proxyd has no association of it any more."""
        wait_for(lambda: not self.connections(), f"no association of {self.name}")

    def records(self) -> list[dict[str, Any]]:
        """Its lines of the access log."""
        lines = (self._lab.folder / "access.log").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if self.name in entry["service"]]

    def wait_records(
        self, count: int, condition: Callable[[dict[str, Any]], bool] = bool
    ) -> list[dict[str, Any]]:
        """Wait for that many lines of the access log, and return them."""

        def reached() -> list[dict[str, Any]] | None:
            found = [entry for entry in self.records() if condition(entry)]
            return found if len(found) >= count else None

        return wait_for(reached, f"{count} lines of the access log")


__all__ = [
    "CLIENT_IP",
    "CLIENT_IP_2",
    "NODE_IP_2",
    "PORT",
    "SctpLab",
    "Service",
    "pod_ip",
    "pod_ip6",
    "second_ip",
]


def resident_by_round(sctp: SctpLab, count: int, rounds: int) -> list[int]:
    """Associations one after the other, a message each way on each: KiB that the worker has after each round of `count`."""
    worker = sctp.worker()
    sizes = []
    with Server(sctp.lab.pods[0], pod_ip(1)) as server, Echo(server):
        service = sctp.service(server)
        for _ in range(rounds):
            for number in range(count):
                with service.connect() as client:
                    message = Message(number.to_bytes(4, "big"), number % 10)
                    client.send(message)
                    assert client.receive() == message
            service.wait_ended()
            sizes.append(resident_kib(worker))
    return sizes
