"""CPU of one proxyd worker beside nginx stream (one process): per connection, per request, per gigabyte.

    python -m bench.relay_cpu [--rounds 3]

Both proxies stand in front of the same small server on loopback and get the same load in turns. CPU is user + system
time of the proxy process alone. Load and server run in processes of their own; figures are ratios, not records.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import uvloop

from tests.support.waiting import wait_for
from tests.support.worker import WorkerDriver

CONCURRENCY = 32
REQUEST = b"q" * 100
NGINX = """
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 8192; }}
stream {{ server {{ listen 127.0.0.1:{listen} backlog=1024; proxy_pass 127.0.0.1:{server}; tcp_nodelay on; }} }}
"""


class Answer(asyncio.Protocol):
    """Answers 100 bytes with 1,000; "b" begins an endless stream, "u" swallows one."""

    mode = b""

    def connection_made(self, transport):
        self.transport = transport
        self.on = True

    def data_received(self, data):
        self.mode = self.mode or data[:1]
        if self.mode == b"q":
            self.transport.write(b"a" * 1000)
        elif self.mode == b"b":
            self.resume_writing()

    def pause_writing(self):
        self.on = False

    def resume_writing(self):
        self.on = True
        while self.on and not self.transport.is_closing():
            self.transport.write(bytes(1 << 18))

    def connection_lost(self, _error):
        self.on = False


def serve(sock: socket.socket) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Answer, sock=sock)
        await server.serve_forever()

    uvloop.run(main())


async def connections(port: int, count: int) -> None:
    """`count` connections of one request each."""
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(REQUEST)
            await reader.readexactly(1000)
            writer.close()
            await writer.wait_closed()

    await asyncio.gather(*(client() for _ in range(CONCURRENCY)))


async def requests(port: int, count: int) -> None:
    """`count` requests on kept connections."""

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(count // CONCURRENCY):
            writer.write(REQUEST)
            await reader.readexactly(1000)
        writer.close()

    await asyncio.gather(*(client() for _ in range(CONCURRENCY)))


async def bulk(port: int, megabytes: int) -> None:
    """`megabytes` from the server on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(b"b")
    left = megabytes << 20
    while left > 0:
        left -= len(await reader.read(1 << 20))
    writer.close()


LOADS = {
    "us/connection": (connections, 6000, 1e6),
    "us/request": (requests, 60_000, 1e6),
    "s/GB": (bulk, 1500, 1024.0),
}


def cpu(pid: int) -> float:
    """Seconds of CPU so far, from the scheduler's nanoseconds."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server_port = listener.getsockname()[1]
    server = os.fork()
    if not server:
        serve(listener)
        os._exit(0)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nginx_port = probe.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="relay-cpu-")
    config = Path(folder) / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, listen=nginx_port, server=server_port))
    nginx_path = shutil.which("nginx") or "/usr/sbin/nginx"
    nginx = subprocess.Popen([nginx_path, "-c", str(config), "-p", folder, "-e", f"{folder}/error.log"])
    worker = WorkerDriver()
    try:
        front = worker.forward(server_port)
        proxies = {"nginx": (nginx.pid, nginx_port), "proxyd": (worker.pid, front.port)}
        with socket.socket() as probe:
            wait_for(lambda: probe.connect_ex(("127.0.0.1", nginx_port)) == 0)
        print(f"{'':14} {'nginx':>8} {'proxyd':>8}  ratio   (median of {rounds})")
        for name, (load, count, scale) in LOADS.items():
            figures: dict[str, list[float]] = {proxy: [] for proxy in proxies}
            for turn in range(rounds + 1):
                for proxy, (pid, port) in proxies.items():
                    before = cpu(pid)
                    uvloop.run(load(port, count))
                    time.sleep(0.05)
                    if turn:  # the first is for warming up
                        figures[proxy].append((cpu(pid) - before) / count * scale)
            a, b = (statistics.median(figures[proxy]) for proxy in proxies)
            print(f"{name:14} {a:8.2f} {b:8.2f} {b / a:6.2f}", flush=True)
        print(f"worker: {worker.rss() / 1e6:.1f} MB")
    finally:
        worker.__exit__()
        nginx.terminate()
        nginx.wait()
        os.kill(server, signal.SIGTERM)
        os.waitpid(server, 0)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
