"""One side of a TCP relay and its peer, over connections on loopback, and what each tells the relay.

The far ends are the test's: `one` and `other`. Every script runs with either of them as the client, with
and without pipes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import socket
import struct
import sys
import termios
from _socket import socket as Socket  # noqa: N812 a class; what a listener makes of a descriptor
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from proxyd.relay.engine import pipes
from proxyd.relay.engine.pipes import Pipe
from proxyd.relay.engine.plane import PENDING_LIMIT, READ_BYTES, TIGHT_READ_BYTES
from proxyd.relay.engine.poller import ERR, HUP, IN, OUT, RDHUP
from proxyd.relay.ipc.options import Options
from proxyd.relay.tcp import pump
from proxyd.relay.tcp.pump import BULK_BYTES, Side
from tests.support.plane import PlaneLab

END = "end"
RESET = "reset"
# Room of each socket; the kernel doubles it.
BUFFER = 128 * 1024
RANDOM = random.Random(1).randbytes(16 * 1024 * 1024)


class Owner:
    """The relay: it ends with whatever it is told, and remembers what that was."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.done = False
        self.told: list[str] = []

    def reset_by(self, side: Side) -> None:
        self._end(f"reset by {self._lab.name(side)}")

    def write_failed(self, side: Side) -> None:
        self._end(f"write to {self._lab.name(side)} failed")

    def finish(self, reason: str) -> None:
        self._end(reason)

    def crash(self) -> None:
        self._end("crash")

    def _end(self, what: str) -> None:
        self.told.append(what)
        self.done = True
        for side in self._lab.sides.values():
            side.held = True
            if isinstance(side.pending, Pipe):
                self._lab.plane.pipes.give(side.pending)
            side.pending = None
            self._lab.plane.poller.close(side.sock)


class FarEnd:
    """The other end of a side's connection. It reads only where a test has it read."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self.heard = bytearray()
        self.over = ""  # END or RESET, once one was seen
        self.to_send = memoryview(b"")
        self.ends = False  # as soon as all is sent

    def push(self) -> None:
        """Send what there is room for; nobody takes anything any more after a reset."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while self.to_send:
                self.to_send = self.to_send[self.sock.send(self.to_send) :]
        if self.ends and not self.to_send:
            self.ends = False
            self.sock.shutdown(socket.SHUT_WR)

    def listen(self, most: int = 1 << 30) -> None:
        """Take what has come."""
        with contextlib.suppress(BlockingIOError):
            while not self.over and len(self.heard) < most:
                try:
                    data = self.sock.recv(min(1 << 20, most - len(self.heard)))
                except ConnectionResetError:
                    self.over = RESET
                else:
                    self.heard += data
                    self.over = "" if data else END


class Lab(PlaneLab):
    """Two sides with their far ends: `one` is the client's side, or else the endpoint's."""

    def __init__(self, resources: contextlib.ExitStack, options: Options, *, mirrored: bool) -> None:
        super().__init__(resources, options)
        self.sides: dict[str, Side] = {}
        self.ends: dict[str, FarEnd] = {}
        self.owner = Owner(self)
        for name in ("other", "one") if mirrored else ("one", "other"):
            near, far = self._connection()
            self.sides[name] = Side(self.owner, near, self.plane, held=False)
            self.ends[name] = FarEnd(far)
        self.one, self.other = self.sides["one"], self.sides["other"]
        self.one.peer, self.other.peer = self.other, self.one
        for side in self.sides.values():
            self.plane.poller.add(side.sock.fileno(), side.ready)
        self.loop.turn()

    def _connection(self) -> tuple[Socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            far = self.resources.enter_context(socket.socket())
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far.connect(server.getsockname())
            near, _ = server.accept()
        sock = Socket(fileno=near.detach())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.resources.callback(sock.close)
        return sock, far

    def name(self, side: Side) -> str:
        return next(name for name, found in self.sides.items() if found is side)

    def until(self, what: Callable[[], object], *readers: str) -> None:
        """Turn until something is true, while far ends send what they have, and `readers` take what comes."""

        def look() -> object:
            for end in self.ends.values():
                if end.sock.fileno() >= 0:
                    end.push()
            for reader in readers:
                self.ends[reader].listen()
            return what()

        self.loop.until(look)

    def settle(self) -> None:
        """Let everything happen that can happen now."""
        for _ in range(5):
            for end in self.ends.values():
                if end.sock.fileno() >= 0:
                    end.push()
            self.loop.turn()

    @property
    def kept(self) -> int:
        """Bytes that the plane counts as kept."""
        return self.plane._pending

    @property
    def pipes_lent(self) -> int:
        return self.plane.pipes.made - len(self.plane.pipes._free)


# -- steps of a script ---------------------------------------------------------------------------------------

Step = Callable[[Lab], None]


def sends(who: str, data: bytes) -> Step:
    """A far end sends; what there is no room for goes later."""

    def step(lab: Lab) -> None:
        end = lab.ends[who]
        end.to_send = memoryview(bytes(end.to_send) + data)
        end.push()

    return step


def urges(who: str, data: bytes) -> Step:
    """A far end sends bytes of which the last is urgent."""

    def step(lab: Lab) -> None:
        lab.ends[who].sock.send(data, socket.MSG_OOB)

    return step


def ends(who: str) -> Step:
    """A far end sends FIN behind all that it has to send."""

    def step(lab: Lab) -> None:
        lab.ends[who].ends = True
        lab.ends[who].push()

    return step


def resets(who: str) -> Step:
    """A far end resets its connection."""

    def step(lab: Lab) -> None:
        sock = lab.ends[who].sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    return step


def turns() -> Step:
    """What has come so far is acted on."""
    return Lab.settle


def hears(who: str, data: bytes) -> Step:
    """A far end hears this next, and no byte more."""

    def step(lab: Lab) -> None:
        end = lab.ends[who]
        lab.until(lambda: len(end.heard) >= len(data) or end.over, who)
        lab.settle()
        end.listen()
        assert bytes(end.heard) == data, f"{len(end.heard)} bytes of {len(data)}"
        end.heard.clear()

    return step


def hears_end(who: str) -> Step:
    """A far end hears nothing more, and then FIN."""

    def step(lab: Lab) -> None:
        end = lab.ends[who]
        lab.until(lambda: end.over, who)
        assert (bytes(end.heard), end.over) == (b"", END)

    return step


def hears_nothing(who: str) -> Step:
    """Nothing has come for a far end, not even FIN."""

    def step(lab: Lab) -> None:
        lab.settle()
        end = lab.ends[who]
        end.listen()
        assert (bytes(end.heard), end.over) == (b"", "")

    return step


def stalls(who: str) -> Step:
    """The side of this far end has read all that the other one takes; bytes are kept for that."""

    def step(lab: Lab) -> None:
        side = lab.sides[who]
        lab.until(lambda: side.peer.pending is not None)
        lab.settle()
        assert side.held
        assert side.peer.pending is not None
        assert lab.kept == len(side.peer.pending) > 0

    return step


def told(*what: str) -> Step:
    """The relay has been told this, and nothing else."""

    def step(lab: Lab) -> None:
        if what:
            lab.until(lambda: lab.owner.told)
        lab.settle()
        assert lab.owner.told == list(what)

    return step


def holds(who: str) -> Step:
    """As a relay holds its client while it dials."""

    def step(lab: Lab) -> None:
        lab.sides[who].held = True

    return step


def releases(who: str) -> Step:
    def step(lab: Lab) -> None:
        lab.sides[who].release()

    return step


# More than the sockets of both sides take, but less than what makes a side bulk.
MUCH = RANDOM[: BULK_BYTES - 1000]
CHAT = [
    sends("one", b"ping"), hears("other", b"ping"), sends("other", b"pong"), hears("one", b"pong"),
]  # fmt: skip

SCRIPTS: dict[str, list[Step]] = {
    # Open.
    "each hears what the other says": [*CHAT, *CHAT, told()],
    "both speak at once": [
        sends("one", b"1"), sends("other", b"2"), hears("one", b"2"), hears("other", b"1"), told(),
    ],
    "a message as large as the buffer is followed by another": [
        sends("one", MUCH[:READ_BYTES]), hears("other", MUCH[:READ_BYTES]), *CHAT, told(),
    ],
    # Held.
    "a side that is held is read when it is released": [
        holds("one"), sends("one", b"early"), hears_nothing("other"), releases("one"),
        hears("other", b"early"), *CHAT, told(),
    ],
    "a side that is held is written to all the same": [
        holds("one"), sends("other", b"greeting"), hears("one", b"greeting"), releases("one"), *CHAT, told(),
    ],
    "a request and its end that came while the side was held": [
        holds("one"), sends("one", b"request"), ends("one"), hears_nothing("other"), releases("one"),
        hears("other", b"request"), hears_end("other"), sends("other", b"answer"), hears("one", b"answer"),
        told(), ends("other"), told("closed"),
    ],
    "a side that is held is reset": [holds("one"), resets("one"), turns(), told("reset by one")],
    "a side that is held sends and is reset": [
        holds("one"), sends("one", b"lost"), resets("one"), turns(), told("reset by one"),
    ],
    # Stalled.
    "a full peer stops reading, and it goes on when there is room": [
        sends("one", MUCH), stalls("one"), hears("other", MUCH), *CHAT, told(),
    ],
    "the other direction goes on while one is stalled": [
        sends("one", MUCH), stalls("one"), sends("other", b"back"), hears("one", b"back"),
        sends("other", b"again"), hears("one", b"again"), hears("other", MUCH), told(),
    ],
    "both directions are stalled": [
        sends("one", MUCH), stalls("one"), sends("other", MUCH[::-1]), turns(), hears("one", MUCH[::-1]),
        hears("other", MUCH), *CHAT, told(),
    ],
    "what comes during a stall whose read was short is read after it": [
        sends("one", MUCH), stalls("one"), sends("one", b"more"), turns(), hears("other", MUCH + b"more"),
        *CHAT, told(),
    ],
    # Half-closed.
    "an end goes on, and the other direction stays open": [
        *CHAT, ends("one"), hears_end("other"), sends("other", b"late"), hears("one", b"late"),
        sends("other", b"later"), hears("one", b"later"), told(), ends("other"), told("closed"),
        hears_end("one"),
    ],
    "bytes and the end come in one event": [
        sends("one", b"last"), ends("one"), hears("other", b"last"), hears_end("other"), told(),
        ends("other"), told("closed"),
    ],
    "both end at once": [ends("one"), ends("other"), told("closed"), hears_end("one"), hears_end("other")],
    "the end comes behind all bytes that waited for room": [
        sends("one", MUCH), ends("one"), stalls("one"), hears("other", MUCH), hears_end("other"),
        sends("other", b"thanks"), hears("one", b"thanks"), told(), ends("other"), told("closed"),
    ],
    "nothing is closed while bytes wait for room, though both have ended": [
        ends("other"), hears_end("one"), sends("one", MUCH), stalls("one"), ends("one"), turns(), told(),
        hears("other", MUCH), told("closed"), hears_end("other"),
    ],
    "the end comes to a side with bytes waiting for it": [
        sends("one", MUCH), stalls("one"), ends("other"), hears_end("one"), told(), hears("other", MUCH),
        ends("one"), told("closed"),
    ],
    # Reset.
    "a reset": [*CHAT, resets("one"), turns(), told("reset by one")],
    "a reset behind bytes comes after them": [
        sends("one", b"last words"), resets("one"), turns(), hears("other", b"last words"),
        told("reset by one"),
    ],
    "a reset behind the end": [
        ends("one"), hears_end("other"), sends("other", b"x"), turns(), resets("one"), turns(),
        told("reset by one"),
    ],
    "a reset by the end that has not ended": [
        ends("one"), hears_end("other"), resets("other"), turns(), told("reset by other"),
    ],
    "a reset of a side that waits for room at its peer": [
        sends("one", MUCH), stalls("one"), resets("one"), turns(), told("reset by one"),
    ],
    # A write that fails.
    "a write to a side that was reset before it was heard of": [
        sends("one", b"x"), resets("other"), turns(), told("write to other failed"),
    ],
    "bytes that waited for room at a side that is reset": [
        sends("one", MUCH), stalls("one"), resets("other"), turns(), told("write to other failed"),
    ],
    "the end for a side that was reset before it was heard of": [
        ends("one"), resets("other"), turns(), told("reset by other"),
    ],
    # Urgent data.
    "urgent data stays in its place": [
        sends("one", b"ab"), urges("one", b"!"), sends("one", b"cd"), hears("other", b"ab!cd"), *CHAT, told(),
    ],
    "urgent data alone": [urges("one", b"!"), hears("other", b"!"), *CHAT, told()],
    "urgent data while a side is held": [
        holds("one"), sends("one", b"ab"), urges("one", b"!"), sends("one", b"cd"), turns(), releases("one"),
        hears("other", b"ab!cd"), *CHAT, told(),
    ],
    "urgent data and the end": [
        sends("one", b"ab"), urges("one", b"!"), ends("one"), hears("other", b"ab!"), hears_end("other"),
        told(),
    ],
    "urgent data where a full read ends": [
        sends("one", MUCH[:READ_BYTES]), urges("one", b"!"), sends("one", b"cd"),
        hears("other", MUCH[:READ_BYTES] + b"!cd"), told(),
    ],
    # Bulk.
    "bulk": [sends("one", RANDOM), hears("other", RANDOM), *CHAT, told()],
    "bulk of odd sizes": [
        sends("one", RANDOM[:2_345_679]), hears("other", RANDOM[:2_345_679]), sends("one", RANDOM[:65_537]),
        hears("other", RANDOM[:65_537]), *CHAT, told(),
    ],
    "bulk and its end": [
        sends("one", RANDOM[:8_000_001]), ends("one"), hears("other", RANDOM[:8_000_001]), hears_end("other"),
        sends("other", b"thanks"), hears("one", b"thanks"), told(), ends("other"), told("closed"),
    ],
    "bulk and urgent data behind it": [
        sends("one", RANDOM[:4_000_000]), hears("other", RANDOM[:4_000_000]), urges("one", b"!"),
        sends("one", b"cd"), hears("other", b"!cd"), *CHAT, told(),
    ],
}  # fmt: skip


@pytest.fixture
def resources() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def laboratory(resources: contextlib.ExitStack, *, splice: bool = True, mirrored: bool = False) -> Lab:
    return Lab(resources, Options(max_relays=1000, tcp_splice=splice), mirrored=mirrored)


@pytest.fixture
def lab(resources: contextlib.ExitStack) -> Lab:
    return laboratory(resources)


@pytest.mark.parametrize("splice", [True, False], ids=["spliced", "copied"])
@pytest.mark.parametrize("mirrored", [False, True], ids=["client", "endpoint"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_script(resources: contextlib.ExitStack, script: str, mirrored: bool, splice: bool) -> None:
    lab = laboratory(resources, splice=splice, mirrored=mirrored)
    for step in SCRIPTS[script]:
        step(lab)
    lab.settle()
    if lab.owner.told in ([], ["closed"]):
        assert lab.kept == 0, "everything that was kept has been sent"
    assert lab.pipes_lent == 0
    assert lab.trouble() == {}


# -- bulk ----------------------------------------------------------------------------------------------------


def begin_bulk(lab: Lab, size: int) -> FarEnd:
    """Have `one` send `size` bytes, and `other` hear them until they go by a pipe."""
    sends("one", RANDOM[:size])(lab)
    lab.until(lambda: lab.one.bulk, "other")
    return lab.ends["other"]


def stall_bulk(lab: Lab, size: int) -> FarEnd:
    """The same, and then `other` hears no more, so that bytes wait in the pipe."""
    other = begin_bulk(lab, size)
    lab.until(lambda: lab.other.pending is not None)
    lab.settle()
    assert isinstance(lab.other.pending, Pipe)
    assert lab.kept == len(lab.other.pending) > 0
    assert lab.pipes_lent == 1
    return other


def test_a_side_is_bulk_only_while_it_brings_much(lab: Lab) -> None:
    sends("one", MUCH)(lab)
    hears("other", MUCH)(lab)
    assert lab.plane.pipes.made == 0, "short transfers are copied"
    other = begin_bulk(lab, len(RANDOM))
    assert not lab.other.bulk
    lab.until(lambda: len(other.heard) == len(RANDOM), "other")
    assert other.heard == RANDOM
    assert lab.plane.pipes.made == 1
    other.heard.clear()
    for step in CHAT:
        step(lab)
    assert not lab.one.bulk


def test_bulk_waits_in_the_pipe_while_the_peer_is_full(lab: Lab) -> None:
    other = stall_bulk(lab, len(RANDOM))
    moved = lab.one.moved
    lab.settle()
    assert lab.one.moved == moved, "it reads no more"
    sends("other", b"back")(lab)
    hears("one", b"back")(lab)
    lab.until(lambda: len(other.heard) == len(RANDOM), "other")
    assert other.heard == RANDOM
    assert (lab.kept, lab.pipes_lent, lab.owner.told) == (0, 0, [])


def test_the_end_comes_behind_bulk_that_waited_in_the_pipe(lab: Lab) -> None:
    other = stall_bulk(lab, len(RANDOM))
    ends("one")(lab)
    lab.until(lambda: other.over, "other")
    assert (bytes(other.heard), other.over) == (RANDOM, END)
    told()(lab)
    ends("other")(lab)
    told("closed")(lab)
    assert (lab.kept, lab.pipes_lent) == (0, 0)


@pytest.mark.parametrize(("who", "what"), [("one", "reset by one"), ("other", "write to other failed")])
def test_a_reset_while_bulk_waits_in_the_pipe(lab: Lab, who: str, what: str) -> None:
    stall_bulk(lab, len(RANDOM))
    resets(who)(lab)
    told(what)(lab)
    assert (lab.pipes_lent, lab.plane.pipes.made) == (0, 0), "a pipe with bytes in it is not used again"


def test_a_reset_of_a_bulk_side(lab: Lab) -> None:
    begin_bulk(lab, len(RANDOM))
    resets("one")(lab)
    lab.until(lambda: lab.owner.told, "other")
    told("reset by one")(lab)
    assert lab.pipes_lent == 0


def test_bulk_for_a_side_that_was_reset_before_it_was_heard_of(lab: Lab) -> None:
    begin_bulk(lab, len(RANDOM))
    lab.until(lambda: not lab.one.held and lab.other.pending is None, "other")
    lab.ends["one"].push()
    resets("other")(lab)
    lab.one.ready_bulk(IN | OUT)
    assert lab.owner.told == ["write to other failed"]
    assert (lab.pipes_lent, lab.plane.pipes.made) == (0, 0)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EPERM])
def test_where_splice_is_not_to_be_had_bulk_is_copied(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    tries: list[int] = []

    def splice(*_: object, **__: object) -> int:
        tries.append(code)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "splice", splice)
    sends("one", RANDOM)(lab)
    hears("other", RANDOM)(lab)
    assert tries == [code], "it is not tried again"
    assert (lab.plane.pipes.made, lab.one.bulk) == (0, False)
    told()(lab)


def test_a_side_that_gets_no_pipe_copies_and_takes_one_that_comes_free(lab: Lab) -> None:
    lab.plane.pipes.most = 1
    lent = lab.plane.pipes.take()
    assert lent is not None
    sends("one", RANDOM[:4_000_000])(lab)
    hears("other", RANDOM[:4_000_000])(lab)
    assert not lab.one.bulk
    lab.plane.pipes.give(lent)
    other = begin_bulk(lab, len(RANDOM))
    taken: list[Pipe | None] = [None]

    def take() -> bool:
        taken[0] = lab.plane.pipes.take()
        return taken[0] is not None

    lab.until(take, "other")  # once nothing waits in it
    lab.until(lambda: len(other.heard) == len(RANDOM), "other")
    assert (bytes(other.heard), lab.one.bulk) == (RANDOM, False)
    assert taken[0] is not None
    lab.plane.pipes.give(taken[0])


def test_while_memory_is_short_reads_are_small_and_nothing_is_bulk(lab: Lab) -> None:
    lab.plane.keep(PENDING_LIMIT + 1)
    sends("one", MUCH)(lab)
    lab.until(lambda: lab.other.pending is not None)
    assert lab.other.pending is not None
    assert 0 < len(lab.other.pending) <= TIGHT_READ_BYTES
    hears("other", MUCH)(lab)
    sends("one", RANDOM[:4_000_000])(lab)
    hears("other", RANDOM[:4_000_000])(lab)
    assert not lab.plane.pipes.made
    lab.plane.keep(-PENDING_LIMIT - 1)
    other = begin_bulk(lab, len(RANDOM))
    lab.until(lambda: len(other.heard) == len(RANDOM), "other")
    assert other.heard == RANDOM


# -- turns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splice", [True, False], ids=["spliced", "copied"])
def test_a_side_has_its_share_and_then_waits_for_its_next_turn(
    resources: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch, splice: bool
) -> None:
    monkeypatch.setattr(pump, "TURN_BYTES", READ_BYTES)
    monkeypatch.setattr(pipes, "PIPE_BYTES", READ_BYTES)
    lab = laboratory(resources, splice=splice)
    if splice:
        monkeypatch.setattr(pump, "BULK_BYTES", 0)
    data = RANDOM[: 3 * READ_BYTES]
    sends("one", data)(lab)
    lab.loop.turn()
    # A side that has just become bulk has a second share.
    assert lab.one.moved == (2 if splice else 1) * READ_BYTES
    # No event comes for the rest: it was all there.
    lab.loop.turn()
    assert lab.one.moved == (3 if splice else 2) * READ_BYTES
    hears("other", data)(lab)


def test_a_relay_that_ended_after_a_side_had_asked_for_another_turn_stays_ended(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "TURN_BYTES", READ_BYTES)
    sends("one", RANDOM[: 3 * READ_BYTES])(lab)
    lab.one.ready(IN | OUT)
    moved = lab.one.moved
    assert 0 < moved < 3 * READ_BYTES
    lab.one.crash()
    lab.loop.turn(3)
    assert (lab.one.moved, lab.owner.told) == (moved, ["crash"])


# -- what no edge tells of -----------------------------------------------------------------------------------


def make_bulk(lab: Lab) -> None:
    """Have `one` use a pipe from the first byte on."""
    assert lab.one._set_bulk(True)


def fill_up(lab: Lab) -> bytes:
    """Leave no room at `other`; returns what its far end hears first."""
    filling = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filling += lab.other.sock.send(bytes(READ_BYTES), socket.MSG_DONTWAIT)
    return bytes(filling)


def test_the_end_that_came_before_a_stall_is_passed_on_after_it(lab: Lab) -> None:
    filling = fill_up(lab)
    sends("one", b"last")(lab)
    ends("one")(lab)
    stalls("one")(lab)
    hears("other", filling + b"last")(lab)
    hears_end("other")(lab)


@pytest.mark.parametrize("splice", [True, False], ids=["spliced", "copied"])
def test_what_a_stalled_side_has_left_unread_is_read_though_nothing_more_comes(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, splice: bool
) -> None:
    monkeypatch.setattr(pipes, "PIPE_BYTES", READ_BYTES)
    filling = fill_up(lab)
    if splice:
        make_bulk(lab)
    sends("one", RANDOM[: 2 * READ_BYTES])(lab)
    stalls("one")(lab)
    assert lab.one.moved == READ_BYTES
    hears("other", filling + RANDOM[: 2 * READ_BYTES])(lab)


def test_urgent_data_that_comes_right_behind_a_full_read_is_kept(lab: Lab) -> None:
    class Slow(Socket):
        """What is urgent comes while a read is under way."""

        def recv_into(self, *arguments: Any) -> int:
            size = super().recv_into(*arguments)
            if size == READ_BYTES:
                urges("one", b"!")(lab)
            return size

    lab.one.sock = Slow(fileno=lab.one.sock.detach())
    lab.resources.callback(lab.one.sock.close)
    sends("one", RANDOM[:READ_BYTES])(lab)
    hears("other", RANDOM[:READ_BYTES] + b"!")(lab)


@pytest.mark.parametrize("data", [b"", b"before"])
def test_urgent_data_and_the_end_that_a_pipe_meets_before_they_are_reported(lab: Lab, data: bytes) -> None:
    make_bulk(lab)
    urges("one", data + b"!")(lab)
    ends("one")(lab)
    lab.one.ready_bulk(IN | OUT)
    hears("other", data + b"!")(lab)
    hears_end("other")(lab)
    told()(lab)


# -- memory and figures --------------------------------------------------------------------------------------


def test_no_more_is_kept_than_one_read(lab: Lab) -> None:
    sends("one", MUCH)(lab)
    stalls("one")(lab)
    moved = lab.one.moved
    assert 0 < lab.kept <= READ_BYTES
    for _ in range(3):
        lab.settle()
    assert lab.one.moved == moved


def test_what_is_kept_goes_in_parts_where_there_is_little_room(lab: Lab) -> None:
    lab.other.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    sends("one", MUCH)(lab)
    stalls("one")(lab)
    hears("other", MUCH)(lab)
    assert lab.kept == 0


def test_unsent_is_what_is_kept_and_what_the_kernel_has(lab: Lab) -> None:
    assert lab.other.unsent() == 0
    sends("one", MUCH)(lab)
    stalls("one")(lab)
    # What the far end's kernel has is acknowledged, though nobody has read it.
    waiting = fcntl.ioctl(lab.ends["other"].sock, termios.FIONREAD, bytes(4))
    taken = int.from_bytes(waiting, sys.byteorder)
    lab.until(lambda: lab.other.unsent() == lab.one.moved - taken)
    assert 0 < lab.kept < lab.other.unsent()
    assert lab.one.unsent() == 0
    lab.ends["other"].listen(1000)
    hears("other", MUCH)(lab)
    lab.until(lambda: lab.other.unsent() == 0)
    assert lab.one.moved == len(MUCH)


# -- errors --------------------------------------------------------------------------------------------------


def test_an_error_that_only_the_event_tells_of_is_a_reset(lab: Lab) -> None:
    """As when another call has taken the socket's error before it is read."""
    lab.one.ready(IN | OUT | ERR)
    assert lab.owner.told == ["reset by one"]


def test_the_end_behind_an_error_is_a_reset(lab: Lab) -> None:
    resets("one")(lab)
    assert lab.one.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
    lab.one.ready(IN | OUT | RDHUP | HUP | ERR)
    assert lab.owner.told == ["reset by one"]


def test_the_last_bytes_and_the_end_go_in_one_packet(lab: Lab) -> None:
    def packets() -> int:
        """How many packets have come to the far end of `other` (tcpi_segs_in of linux/tcp.h)."""
        info = lab.ends["other"].sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        return int(struct.unpack_from("=I", info, 140)[0])

    before = packets()
    sends("one", b"last")(lab)
    ends("one")(lab)
    hears("other", b"last")(lab)
    hears_end("other")(lab)
    assert packets() == before + 1
