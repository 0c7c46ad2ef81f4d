"""What answers in the pods: nginx (HTTP) and an echo of datagrams; and how many requests were answered."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from bench import datagrams
from bench.net import HTTP_PORT, UDP_PORT, Lab, Namespace, pod_ip
from bench.processes import Program
from tests.support.waiting import wait_for

BODY_BYTES = 1000
_NGINX = """
user root; daemon off; master_process off; worker_processes 1; worker_rlimit_nofile {files};
pid {folder}/{name}.pid; error_log {folder}/{name}.log crit;
events {{ worker_connections 16384; }}
http {{
  access_log off; server_tokens off; default_type text/plain; tcp_nodelay on;
  keepalive_requests 1000000000; keepalive_timeout 3600s;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder}; uwsgi_temp_path {folder};
  scgi_temp_path {folder};
  server {{
    listen {port} backlog=4096;
    location / {{ return 200 "{body}"; }}
    location = /status {{ stub_status; }}
  }}
}}
"""


def body(pod: int) -> str:
    """What a pod answers to every request: who it is, and then always the same."""
    return f"pod-{pod}".ljust(BODY_BYTES, ".")


def whose(answer: bytes) -> int:
    """Number of the pod that gave this answer; 0 where it is not the right one to the last byte."""
    head, _, text = answer.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 200 ") and text[:4] == b"pod-" and text[4:5].isdigit():
        number = int(text[4:5])
        return number if text == body(number).encode() else 0
    return 0


def ask(namespace: Namespace, address: tuple[str, int], timeout: float = 1.0) -> int:
    """Which pod answers a request at an address; 0 for none, or not rightly."""
    answer = b""
    with contextlib.suppress(OSError), namespace.socket() as sock:
        sock.settimeout(timeout)
        sock.connect(address)
        sock.sendall(b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
        while part := sock.recv(65536):
            answer += part
    return whose(answer)


def ask_udp(namespace: Namespace, address: tuple[str, int], timeout: float = 0.2) -> bool:
    """Whether a datagram comes back from an address."""
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(address)
            sock.send(b"hello")
            return sock.recv(10) == b"hello"
        except OSError:
            return False


class Pods:
    """The servers, on the given CPUs."""

    def __init__(self, lab: Lab, folder: Path, cpus: Sequence[int] | None, files: int) -> None:
        self._lab = lab
        self._cleanup = contextlib.ExitStack()
        self._status: list[http.client.HTTPConnection] = []
        self._asked = 0
        self._pids: list[int] = []
        try:
            self._start(folder, cpus, files)
        except BaseException:
            self.close()
            raise

    def _start(self, folder: Path, cpus: Sequence[int] | None, files: int) -> None:
        nginx = shutil.which("nginx") or "nginx"
        for number, pod in enumerate(self._lab.pods, 1):
            config = folder / f"pod-{number}.conf"
            config.write_text(
                _NGINX.format(folder=folder, name=pod.name, port=HTTP_PORT, body=body(number), files=files)
            )
            log = folder / f"pod-{number}.log"
            command = [nginx, "-c", str(config), "-p", str(folder), "-e", str(log)]
            self._run(pod, command, cpus, log)
        self._start_echo(cpus)
        for number in range(1, len(self._lab.pods) + 1):
            address = (pod_ip(number), HTTP_PORT)
            wait_for(
                lambda address=address, number=number: ask(self._lab.client, address) == number,
                f"an answer of pod-{number}; see {folder}/pod-{number}.log",
            )
            connection = http.client.HTTPConnection(*address, timeout=10)
            connection.sock = self._lab.node.socket()
            connection.sock.settimeout(10)
            connection.sock.connect(address)
            self._status.append(connection)

    def _run(self, pod: Namespace, command: list[str], cpus: Sequence[int] | None, log: Path) -> None:
        program = Program(pod, command, cpus=cpus, log=log, folder=log.parent)
        self._cleanup.enter_context(program)
        self._pids.append(program.pid)

    def _start_echo(self, cpus: Sequence[int] | None) -> None:
        """One process that answers for all pods."""
        with contextlib.ExitStack() as stack:
            sockets = []
            for number, pod in enumerate(self._lab.pods, 1):
                sock = stack.enter_context(pod.socket(socket.AF_INET, socket.SOCK_DGRAM))
                sock.bind((pod_ip(number), UDP_PORT))
                sockets.append(sock.fileno())
            pin = ["taskset", "--cpu-list", ",".join(map(str, cpus))] if cpus else []
            process = subprocess.Popen(
                [
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    *pin,
                    sys.executable,
                    datagrams.__file__,
                    "echo",
                    *map(str, sockets),
                ],
                pass_fds=sockets,
                start_new_session=True,
            )
        self._pids.append(process.pid)
        self._cleanup.callback(process.wait)
        self._cleanup.callback(process.kill)

    def pids(self) -> list[int]:
        """Processes of the servers."""
        return self._pids

    def requests(self) -> int:
        """HTTP requests that all pods have answered so far; asking is not counted."""
        total = 0
        for connection in self._status:
            connection.request("GET", "/status")
            total += int(connection.getresponse().read().split()[9])
            self._asked += 1
        return total - self._asked

    def close(self) -> None:
        """End them."""
        for connection in self._status:
            connection.close()
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hard_limit() -> int:
    """Raise this process's limit of open files, and so its children's, as far as it goes; how far that is."""
    import resource  # noqa: PLC0415

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return int(hard) if hard != resource.RLIM_INFINITY else os.sysconf("SC_OPEN_MAX")
