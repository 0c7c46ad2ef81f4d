"""Drives one real worker process over its real channel, with real sockets on loopback."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from proxyd.relay.ipc import slots as s
from proxyd.relay.ipc.channel import Channel
from proxyd.relay.ipc.messages import (
    Acknowledged,
    Apply,
    BalancerConfig,
    CloseListener,
    Connection,
    Connections,
    Drained,
    ListenerConfig,
    LiveConnection,
    LiveConnections,
    Ready,
    Shutdown,
    Trouble,
)
from proxyd.relay.ipc.options import Options
from tests.support.pod_servers import BLOCK, stream, stream_digest
from tests.support.waiting import DEADLINE, NotInTime, source_of, wait_for

MIB = 1 << 20
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def listen(backlog: int = 1024, host: str = "127.0.0.1") -> socket.socket:
    """A listening socket as control makes them."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.bind((host, 0))
    sock.listen(backlog)
    return sock


_refusing: list[socket.socket] = []


def refusing_port() -> int:
    """A port that refuses connections. It is held, so that nobody else can take it; below the range for outgoing ones."""
    for port in range(20_000 + os.getpid() % 5000, 32_000):
        sock = socket.socket()
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            sock.close()
            continue
        _refusing.append(sock)  # it never listens
        return port
    raise AssertionError("no free port")


def reset(sock: socket.socket) -> None:
    """Close with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    sock.close()


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the end."""
    parts = []
    while part := sock.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def blocks(seed: int, count: int) -> Iterator[bytes]:
    """`count` blocks of a MiB that only this seed gives."""
    parts = stream(seed, count * MIB)
    while block := b"".join(itertools.islice(parts, MIB // BLOCK)):
        yield block


def digest_of(seed: int, count: int) -> tuple[int, str]:
    """What `read_digest` says of them."""
    return count * MIB, stream_digest(seed, count * MIB)


def expect_reset(sock: socket.socket) -> None:
    try:
        data = read_all(sock)
    except ConnectionResetError:
        return
    raise AssertionError(f"no reset, but an end after {data!r}")


def idle(worker: WorkerDriver, balancer_slot: int) -> bool:
    return worker.total(balancer_slot, s.OPENED) == worker.total(balancer_slot, s.CLOSED)


class Server:
    """A small server; `handle(connection)` runs in a thread for each connection, which is closed after it."""

    def __init__(self, handle: Callable[[socket.socket], None], backlog: int = 1024) -> None:
        self.socket = listen(backlog)
        self.port: int = self.socket.getsockname()[1]
        self.accepted = 0
        self.errors: list[Exception] = []
        self._handle = handle
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                conn, _ = self.socket.accept()
            except OSError:
                return
            conn.settimeout(DEADLINE * 2)
            self.accepted += 1
            self._open.append(conn)
            thread = threading.Thread(target=self._serve, args=(conn,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, conn: socket.socket) -> None:
        with conn:
            try:
                self._handle(conn)
            except OSError:
                pass
            except Exception as error:  # noqa: BLE001 reported at the end of the test
                self.errors.append(error)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(DEADLINE)
        self.socket.close()
        for conn in self._open:
            with contextlib.suppress(OSError):
                conn.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE)
        assert not self.errors, self.errors


def names(name: bytes) -> Callable[[socket.socket], None]:
    """A server that says its name and closes."""

    def handle(conn: socket.socket) -> None:
        conn.sendall(name)
        conn.shutdown(socket.SHUT_WR)
        read_all(conn)

    return handle


def echo(conn: socket.socket) -> None:
    """A server that gives everything back, and the end."""
    while data := conn.recv(1 << 16):
        conn.sendall(data)


class WorkerDriver:
    """A worker process. Use as a context manager; `before` is a command that becomes the one that follows it.

    `arguments` stand for its options, as an earlier daemon gives them.
    """

    def __init__(
        self,
        *arguments: str,
        files: int | None = None,
        before: Sequence[str] = (),
        **options: Any,
    ) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.slots = s.Slots.create()

        with theirs:
            # From its very beginning: it reads its limits when it starts.
            limited = [] if files is None else ["prlimit", f"--nofile={files}:{files}"]
            command = [
                *before, *limited, sys.executable, "-m", "proxyd.relay.worker", f"--channel-fd={theirs.fileno()}",
                f"--slots-fd={self.slots.fd}", "--index=0",
                *(arguments or [f"--options={Options(**options).encode()}"]),
            ]  # fmt: skip
            self.process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(), self.slots.fd), stderr=subprocess.PIPE
            )
        self.pid = self.process.pid
        self._listen_to(Channel(ours))

    def _listen_to(self, channel: Channel) -> None:
        """Wait until the worker at the other end is ready."""
        self.channel = channel
        self.generation = 0
        self.acknowledged = 0
        self.ready = False
        self.drained: list[int] = []
        self.records: list[Connection] = []
        self.dropped = 0
        self.live: list[LiveConnection] = []  # as `ListConnections` was answered
        self.trouble: dict[str, int] = {}
        self.trouble_messages = 0
        self._ids = iter(range(1, 1 << 16))
        self._sockets: list[socket.socket] = []
        self._servers: list[Server] = []
        self.wait(lambda: self.ready)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
        self.channel.close()
        try:
            self.process.wait(DEADLINE)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            assert self.process.stderr is not None
            errors = self.process.stderr.read().decode()
            self.process.stderr.close()
            for sock in self._sockets:
                sock.close()
            self.slots.close()
        assert not errors, errors
        assert not [text for text in self.trouble if "internal error" in text], self.trouble

    # -- talking to it

    def pump(self) -> None:
        """Take what the worker has said."""
        while (received := self.channel.receive()) is not None:
            message, _ = received
            match message:
                case Ready():
                    self.ready = True
                case Acknowledged(generation=generation):
                    self.acknowledged = generation
                case Drained(listeners=listeners):
                    self.drained += listeners
                case Connections(records=records, dropped=dropped):
                    self.records += records
                    self.dropped += dropped
                case LiveConnections(records=records):
                    self.live += records
                case Trouble(counts=counts):
                    self.trouble_messages += 1
                    for text, count in counts.items():
                        self.trouble[text] = self.trouble.get(text, 0) + count

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait until `condition()` is true, listening to the worker."""

        def asked() -> object:
            self.pump()
            return condition()

        try:
            wait_for(asked, source_of(condition))
        except NotInTime as error:
            error.add_note(f"trouble: {self.trouble}")
            raise

    def apply(self, *, descriptors: Sequence[int] = (), acknowledge: bool = True, **parts: object) -> None:
        """Send an update of one part; wait until it is in force."""
        self.generation += 1
        message = Apply(self.generation, True, **parts)  # type: ignore[arg-type]  # the test's own parts
        wait_for(lambda: self.channel.send(message, descriptors))
        if acknowledge:
            self.wait(lambda: self.acknowledged >= self.generation)

    def shutdown(self, drain: float) -> None:
        self.channel.send(Shutdown(drain))

    # -- building

    def id(self) -> int:
        return next(self._ids)

    def serve(self, handle: Callable[[socket.socket], None], backlog: int = 1024) -> Server:
        server = Server(handle, backlog)
        self._servers.append(server)
        return server

    def balancer(
        self,
        ports: Sequence[int | tuple[str, int]],
        *,
        number: int | None = None,
        affinity: int = 0,
        first: int = 1000,
    ) -> int:
        """Set a balancer over these ports of 127.0.0.1; counter slot of port i is `first + i`."""
        number = self.id() if number is None else number
        where = [("127.0.0.1", port) if isinstance(port, int) else port for port in ports]
        endpoints = [(ip, port, first + i) for i, (ip, port) in enumerate(where)]
        self.apply(balancers=[BalancerConfig(number, "prod/web", endpoints, affinity)])
        return number

    def listener(self, balancer: int, *, ranges: Sequence[str] = (), host: str = "127.0.0.1") -> Frontend:
        """Open a listener for a balancer."""
        sock = listen(host=host)
        self._sockets.append(sock)
        number = self.id()
        frontend = Frontend(number, sock)
        config = ListenerConfig(number, balancer, "TCP", f"{host}:{frontend.port}", list(ranges))
        self.apply(listeners=[config], descriptors=[sock.fileno()])
        return frontend

    def forward(self, *ports: int, affinity: int = 0) -> Frontend:
        """A listener in front of these ports of 127.0.0.1."""
        return self.listener(self.balancer(ports, affinity=affinity))

    def close_listener(self, frontend: Frontend, drain: float | None = None) -> None:
        self.apply(close=[CloseListener(frontend.number, drain)])

    # -- looking at it

    def total(self, slot: int, field: int) -> int:
        return self.slots.read(slot, 1)[field]

    def rss(self) -> int:
        """Resident memory in bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def wait_idle(self) -> None:
        """Wait until it uses next to no CPU for a while: one that spins never comes to that."""

        def quiet() -> bool:
            before = self.cpu()
            time.sleep(0.3)
            return self.cpu() - before < 0.05

        self.wait(quiet)

    def cpu(self) -> float:
        """Seconds of CPU, user and system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Frontend:
    """A listener of the worker, as a client sees it."""

    def __init__(self, number: int, sock: socket.socket) -> None:
        self.number = number
        self.socket = sock
        self.address = sock.getsockname()[:2]
        self.port: int = self.address[1]

    def connect(self, source: str | None = None, timeout: float = DEADLINE * 2) -> socket.socket:
        return socket.create_connection(
            self.address, timeout=timeout, source_address=(source, 0) if source else None
        )

    def read(self, source: str | None = None) -> bytes:
        """What comes to a client that neither says anything nor ends."""
        with self.connect(source) as sock:
            return read_all(sock)

    def ask(self, source: str | None = None) -> bytes:
        """What the server says to a client that says nothing."""
        with self.connect(source) as sock:
            sock.shutdown(socket.SHUT_WR)
            return read_all(sock)


@contextlib.contextmanager
def running(
    *arguments: str, files: int | None = None, before: Sequence[str] = (), **options: Any
) -> Iterator[WorkerDriver]:
    """A worker process for one test, with these `Options`; `before` is the beginning of its command line."""
    with WorkerDriver(*arguments, files=files, before=before, **options) as worker:
        yield worker
