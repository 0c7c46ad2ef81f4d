"""A worker's plane, whose event loop and clock a test moves by hand, and control's end of its channel."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator
from typing import Any

from proxyd.relay.engine.plane import Plane
from proxyd.relay.engine.reporter import Reporter
from proxyd.relay.ipc.channel import Channel
from proxyd.relay.ipc.messages import Connection, Connections, Failure, Failures, Trouble
from proxyd.relay.ipc.options import Options
from proxyd.relay.ipc.slots import Slots
from tests.support.manual_loop import ManualLoop


class PlaneLab:
    """A plane; descriptors and what comes of them are real.

    Args:
        resources: closes everything at the end of the test.
        options: of the worker.
    """

    def __init__(self, resources: contextlib.ExitStack, options: Options) -> None:
        self.resources = resources
        self.loop = loop = resources.enter_context(ManualLoop())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = Channel(ours)
        channel = Channel(theirs)
        self.slots = Slots.create()
        self.reporter = Reporter(loop, channel)
        self.plane = Plane(loop, self.reporter, self.slots, 0, options, now=loop.time)
        self._said: list[Any] = []
        for undo in (self.slots.close, ours.close, channel.close, self.reporter.stop, self.plane.shut):
            resources.callback(undo)

    def count(self, row: int, field: int) -> int:
        """A counter."""
        return self.slots.view[row + field]

    def said(self) -> list[Any]:
        """All that control has been told."""
        self.reporter.flush()
        while (received := self._control.receive()) is not None:
            self._said.append(received[0])
        return self._said

    def trouble(self) -> dict[str, int]:
        """The texts of trouble, and how often each was told."""
        counts: dict[str, int] = {}
        for message in self.said():
            if isinstance(message, Trouble):
                for text, count in message.counts.items():
                    counts[text] = counts.get(text, 0) + count
        return counts

    def failures(self) -> list[Failure]:
        """The failures that control has been told of."""
        return [
            failure for message in self.said() if isinstance(message, Failures) for failure in message.records
        ]

    def records(self) -> list[Connection]:
        """The relays that have ended, where the options have them recorded."""
        return [
            record
            for message in self.said()
            if isinstance(message, Connections)
            for record in message.records
        ]


def closed_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> tuple[socket.socket, int]:
    """A port of 127.0.0.1 that refuses: nobody listens there, nobody else can while the socket is open.

    A UDP socket is connected to itself, so that it takes no datagram of others.
    """
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind(("127.0.0.1", 0))
    port: int = sock.getsockname()[1]
    if kind == socket.SOCK_DGRAM:
        sock.connect(("127.0.0.1", port))
    return sock, port


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Let this process open no descriptor meanwhile; those that are open stay so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
