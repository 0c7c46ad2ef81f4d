"""Pod servers: one process that answers on listening sockets it is given, each under the name of its pod.

A client's first line is a command, and the rest of the connection is what that command says:

    who                  the pod's name, then close
    peer                 the pod's name and the client's address as the pod sees it
    echo                 everything back, until the client's end; then close
    duplex N SEED        send stream SEED of N bytes while reading to the client's end; then the digest of what was read
    late SECONDS         read to the client's end, wait, then answer with the digest and close
    early KEY            "early" and the end at once; then read to the client's end and keep the digest as KEY
    reset                "ready"; at the next byte, a reset
    watch KEY            "ready"; read until the connection ends and keep how as KEY: "eof N" or "reset N"
    push N SEED KEY      send stream SEED of N bytes and close; how far it got is kept as KEY
    stall KEY            "ready"; read nothing until `resume KEY`, then read to the end and answer with the digest

and on a connection of the test's own, not through a proxy:

    report KEY           what is kept as KEY, once it is there (at most 20 s)
    progress KEY         what is kept as KEY now
    resume KEY           let `stall KEY` read
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
BLOCK = 1 << 18


def stream(seed: int, size: int) -> Iterator[bytes]:
    """`size` bytes that only this seed gives: each block begins with its number, so a lost or swapped one shows."""
    body = random.Random(seed).randbytes(BLOCK - 8)
    number = 0
    while size > 0:
        block = number.to_bytes(8, "big") + body
        yield block if size >= BLOCK else block[:size]
        size -= BLOCK
        number += 1


def stream_digest(seed: int, size: int) -> str:
    """Digest of that stream."""
    digest = hashlib.sha256()
    for block in stream(seed, size):
        digest.update(block)
    return digest.hexdigest()


def read_digest(sock: socket.socket, first: bytes = b"", limit: int | None = None) -> tuple[int, str]:
    """Read a blocking socket to its end, or `limit` bytes: how many came, and their digest."""
    digest = hashlib.sha256(first)
    count = len(first)
    buffer = bytearray(BLOCK)
    view = memoryview(buffer)
    while limit is None or count < limit:
        got = sock.recv_into(view if limit is None else view[: min(BLOCK, limit - count)])
        if not got:
            break
        digest.update(view[:got])
        count += got
    return count, digest.hexdigest()


@dataclass
class _Talk:
    """One connection: its socket, what came after the command, who serves and who asks."""

    sock: socket.socket
    rest: bytes
    pod: str
    peer: str


class _Server:
    """What the process knows: kept values, and who waits for what."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self.events: dict[str, asyncio.Event] = {}
        self.loop = asyncio.get_running_loop()
        self.tasks: set[asyncio.Task[None]] = set()

    async def accept(self, pod: str, listener: socket.socket) -> None:
        listener.setblocking(False)
        while True:
            sock, peer = await self.loop.sock_accept(listener)
            task = self.loop.create_task(self.connection(pod, sock, f"{peer[0]}".removeprefix("::ffff:")))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def connection(self, pod: str, sock: socket.socket, peer: str) -> None:
        with sock, contextlib.suppress(ConnectionError):
            sock.setblocking(False)
            data = b""
            while b"\n" not in data:
                got = await self.loop.sock_recv(sock, 65536)
                if not got:
                    return
                data += got
            line, rest = data.split(b"\n", 1)
            command, *words = line.decode().split()
            await getattr(self, f"do_{command}")(_Talk(sock, rest, pod, peer), *words)

    async def say(self, talk: _Talk, text: str) -> None:
        await self.loop.sock_sendall(talk.sock, text.encode() + b"\n")

    async def read(self, talk: _Talk) -> tuple[int, str]:
        talk.sock.setblocking(True)
        return await self.loop.run_in_executor(None, read_digest, talk.sock, talk.rest)

    def event(self, key: str) -> asyncio.Event:
        return self.events.setdefault(key, asyncio.Event())

    def keep(self, key: str, value: str) -> None:
        self.kept[key] = value
        self.event(key).set()

    async def do_who(self, talk: _Talk) -> None:
        await self.say(talk, talk.pod)

    async def do_peer(self, talk: _Talk) -> None:
        await self.say(talk, f"{talk.pod} {talk.peer}")

    async def do_echo(self, talk: _Talk) -> None:
        data = talk.rest
        while data or (data := await self.loop.sock_recv(talk.sock, 65536)):
            await self.loop.sock_sendall(talk.sock, data)
            data = b""

    async def do_duplex(self, talk: _Talk, size: str, seed: str) -> None:
        talk.sock.setblocking(True)

        def send() -> None:
            for block in stream(int(seed), int(size)):
                talk.sock.sendall(block)

        sending = self.loop.run_in_executor(None, send)
        _, digest = await self.read(talk)
        await sending
        talk.sock.sendall(digest.encode())

    async def do_late(self, talk: _Talk, seconds: str) -> None:
        _, digest = await self.read(talk)
        await asyncio.sleep(float(seconds))
        talk.sock.sendall(digest.encode())

    async def do_early(self, talk: _Talk, key: str) -> None:
        await self.say(talk, "early")
        talk.sock.shutdown(socket.SHUT_WR)
        _, digest = await self.read(talk)
        self.keep(key, digest)

    async def do_reset(self, talk: _Talk) -> None:
        await self.say(talk, "ready")
        await self.loop.sock_recv(talk.sock, 1)
        talk.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    async def do_watch(self, talk: _Talk, key: str) -> None:
        await self.say(talk, "ready")
        count = len(talk.rest)
        how = "eof"
        try:
            while got := await self.loop.sock_recv(talk.sock, 65536):
                count += len(got)
        except ConnectionResetError:
            how = "reset"
        self.keep(key, f"{how} {count}")

    async def do_push(self, talk: _Talk, size: str, seed: str, key: str) -> None:
        sent = 0
        for block in stream(int(seed), int(size)):
            for first in range(0, len(block), 16384):
                part = block[first : first + 16384]
                await self.loop.sock_sendall(talk.sock, part)
                sent += len(part)
                self.keep(key, str(sent))

    async def do_stall(self, talk: _Talk, key: str) -> None:
        await self.say(talk, "ready")
        await self.event(key).wait()
        count, digest = await self.read(talk)
        talk.sock.sendall(f"{count} {digest}".encode())

    async def do_resume(self, talk: _Talk, key: str) -> None:
        self.event(key).set()
        await self.say(talk, "resumed")

    async def do_progress(self, talk: _Talk, key: str) -> None:
        await self.say(talk, self.kept.get(key, ""))

    async def do_report(self, talk: _Talk, key: str) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.event(key).wait(), 20)
        await self.say(talk, self.kept.get(key, "nothing"))


class PodServers:
    """The process, as the test sees it: `add` listening sockets, then `start`."""

    def __init__(self) -> None:
        self._sockets: list[tuple[str, socket.socket]] = []
        self._process: subprocess.Popen[bytes] | None = None

    def add(self, pod: str, listener: socket.socket) -> None:
        """Serve as `pod` on a listening socket; it is closed here once the process has it."""
        self._sockets.append((pod, listener))

    def start(self) -> None:
        """Start serving. Connections made before this wait in the backlog."""
        fds = [sock.fileno() for _, sock in self._sockets]
        names = [f"{pod}={sock.fileno()}" for pod, sock in self._sockets]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", sys.executable, __file__, *names], pass_fds=fds
        )
        self._close_sockets()

    def _close_sockets(self) -> None:
        for _, sock in self._sockets:
            sock.close()
        self._sockets.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_sockets()
        if self._process is not None:
            self._process.kill()
            self._process.wait()


async def _serve(names: list[str]) -> None:
    server = _Server()
    async with asyncio.TaskGroup() as group:
        for name in names:
            pod, fd = name.split("=")
            group.create_task(server.accept(pod, socket.socket(fileno=int(fd))))


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1:]))
