"""Clients: one question, a refused connection, and load with the record of every connection."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.support.netlab import Namespace
from tests.support.waiting import wait_for

T = TypeVar("T")

_keys = itertools.count(1)


def new_key() -> str:
    """A name that no other connection of this run has (see pod_servers.py)."""
    return f"key-{next(_keys)}"


def connect(namespace: Namespace, ip: str, port: int, timeout: float = 20) -> socket.socket:
    """A connected blocking TCP socket.

    Raises:
        OSError: refused, unreachable or too late.
    """
    sock = namespace.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
    try:
        sock.settimeout(timeout)
        sock.connect((ip, port))
    except BaseException:
        sock.close()
        raise
    return sock


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the end."""
    parts = []
    while got := sock.recv(65536):
        parts.append(got)
    return b"".join(parts)


def read_line(sock: socket.socket) -> str:
    """One line, and not a byte more.

    Raises:
        AssertionError: the connection ended within it.
    """
    line = b""
    while not line.endswith(b"\n"):
        got = sock.recv(1)
        assert got, f"the connection ended after {line!r}"
        line += got
    return line.decode().strip()


def ask(namespace: Namespace, ip: str, port: int, command: str = "who", timeout: float = 20) -> str:
    """The answer of the server behind ip:port to one command.

    Raises:
        OSError: the connection was refused, reset or too slow.
    """
    with connect(namespace, ip, port, timeout) as sock:
        sock.sendall(command.encode() + b"\n")
        return read_all(sock).decode().strip()


def refused(namespace: Namespace, ip: str, port: int, within: float = 1.0) -> bool:
    """Whether a connection is refused, and at once. Anything else than refused (hanging, unreachable) is not."""
    try:
        connect(namespace, ip, port, within).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def turned_away(namespace: Namespace, ip: str, port: int, within: float = 1.0) -> bool:
    """Whether a connection fails at once, as refused or as unreachable."""
    try:
        connect(namespace, ip, port, within).close()
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


def answers(namespace: Namespace, ip: str, port: int, timeout: float = 2) -> bool:
    """Whether a server answers there."""
    try:
        return bool(ask(namespace, ip, port, timeout=timeout))
    except OSError:
        return False


def answer(namespace: Namespace, ip: str, port: int, timeout: float = 20) -> str:
    """Who answers there; "" for nobody, whatever the reason."""
    try:
        return ask(namespace, ip, port, timeout=timeout)
    except OSError:
        return ""


def lines_of(path: Path) -> list[str]:
    """The whole lines of a file that another process writes; none where it is not there yet."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def records(path: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` records of an access log, once they are there."""
    wait_for(lambda: len(lines_of(path)) >= count, f"{count} records")
    return [json.loads(line) for line in lines_of(path)[:count]]


@dataclass
class Outcome:
    """What became of the connections of a load: who answered how fast, and what failed."""

    answered: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)  # the connection could not be made
    broken: list[str] = field(default_factory=list)  # it was made, and ended before the answer
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def total(self) -> int:
        """Connections that were answered."""
        return self.answered.total()

    def median(self, *names: str) -> float:
        """Median seconds from connect to answer of these servers' connections."""
        return median(itertools.chain.from_iterable(self.seconds.get(name, []) for name in names))

    def add(self, name: str, seconds: float) -> None:
        """Record one answer; from any thread."""
        with self._lock:
            self.answered[name] += 1
            self.seconds.setdefault(name, []).append(seconds)


def one(outcome: Outcome, namespace: Namespace, ip: str, port: int, timeout: float = 30) -> None:
    """Make one connection, ask who serves it, and record what came of it."""
    begin = time.monotonic()
    try:
        sock = connect(namespace, ip, port, timeout)
    except OSError as error:
        outcome.refused.append(repr(error))
        return
    try:
        with sock:
            sock.sendall(b"who\n")
            name = read_all(sock).decode().strip()
    except OSError as error:
        outcome.broken.append(repr(error))
        return
    if name:
        outcome.add(name, time.monotonic() - begin)
    else:
        outcome.broken.append("ended without an answer")


def many(namespace: Namespace, ip: str, port: int, count: int) -> Outcome:
    """Make connections one after the other."""
    outcome = Outcome()
    for _ in range(count):
        one(outcome, namespace, ip, port)
    return outcome


class Load:
    """Clients that connect, ask and close, over and over, while the test does something else."""

    def __init__(self, namespace: Namespace, ip: str, port: int, clients: int = 2) -> None:
        self.outcome = Outcome()
        self._stop = threading.Event()
        self._target = (namespace, ip, port)
        self._threads = [threading.Thread(target=self._client, name=f"load-{n}") for n in range(clients)]

    def _client(self) -> None:
        while not self._stop.is_set():
            one(self.outcome, *self._target)

    def wait_more(self, count: int) -> None:
        """Wait until `count` more connections have been answered."""
        goal = self.outcome.total + count
        wait_for(lambda: self.outcome.total >= goal, f"{count} more answers under load")

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
