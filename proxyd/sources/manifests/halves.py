"""A second process that reads half of many manifests: parsing is pure work, and the first load is waited for."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from proxyd.api.decode import Decoded, decode
from proxyd.api.discovery import Endpoints, EndpointSlice
from proxyd.api.pod import Pod
from proxyd.api.rules import Rules
from proxyd.api.service import Service
from proxyd.sources.manifests.files import FileEntry, Stamp, display
from proxyd.sources.manifests.merging import FileState, key_of
from proxyd.sources.manifests.parse import LARGE
from proxyd.sources.manifests.regular import digest, read_regular
from proxyd.sources.text.documents import Unreadable, read_documents

# Bytes of all files together from which a second process saves more than it costs.
WORTHWHILE = 512 << 10
# From here on memory counts for more: it takes as much once more.
_TOO_MUCH = 64 << 20
# The share that the caller reads. Starting a process and handing over what it found take time too, and so does what the
# caller does while it waits.
_MINE = 0.42
# The other half is as large as one's own: one that takes this much longer is not coming.
_PATIENCE = 1.0  # seconds
_LIFETIME = 60  # seconds that the second process may run, whatever becomes of the first
# Their handlers may raise. One that came between fork(2) and the note of its pid would leave the process to nobody.
_ORDERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_KINDS = (Service, Endpoints, EndpointSlice, Pod)
_DECODERS: list[msgspec.msgpack.Decoder[Any]] = [msgspec.msgpack.Decoder(kind) for kind in _KINDS]
_ENCODER = msgspec.msgpack.Encoder()
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}


class _Found(msgspec.Struct, array_like=True, gc=False):
    """What one file holds: its documents without problems, of one object each."""

    number: int  # in the order of the caller's files
    stamp: Stamp | None
    digest: bytes
    kinds: list[int]  # in _KINDS
    things: list[msgspec.Raw]
    texts: list[str]  # of the documents; none where it is whole
    whole: bool = False  # nothing else is in the file: the caller need not read it


class SecondHalf(Mapping[str, Decoded]):
    """What the documents of the second half hold, by their text, as `parse_file` takes it.

    Asked in order for the documents of the first half it has none of them; asked for more it waits for the other
    process. It may lack any document: what it lacks, the caller reads. Of small files without a problem it has the whole
    state.

    Args:
        descriptor: of the file that the process is to write to.
        entries: all files.
        start: number of the first file that it is to read.
        first: characters of documents in that file that it is to leave to the caller.
        idle: called before it waits for that process.
    """

    def __init__(
        self,
        descriptor: int,
        entries: Sequence[FileEntry],
        start: int,
        first: int,
        idle: Callable[[], None] | None = None,
    ) -> None:
        self._idle = idle
        self._pid = 0
        self._descriptor = descriptor
        self._entries = entries
        self._start = start
        self._left = first
        self._began = time.monotonic()
        self._found: dict[str, Decoded] = {}
        self._states: dict[int, FileState] = {}

    def begin(self, rules: Rules) -> None:
        """Start the other process. Where that is not possible, it has nothing.

        Args:
            rules: what is valid.
        """
        with _orders_held():
            try:
                pid = os.fork()
            except OSError:
                self._end()
                return
            if pid == 0:
                _read_half(self._descriptor, self._entries[self._start :], self._start, rules, self._left)
            self._pid = pid

    def __contains__(self, text: object) -> bool:
        if self._left > 0 and isinstance(text, str):
            self._left -= len(text)
            return False
        return text in self._all()

    def __getitem__(self, text: str) -> Decoded:
        return self._all()[text]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def of(self, number: int) -> SecondHalf | None:
        """What to look in for the documents of one file, which are asked for in order; None where it has none."""
        if number > self._start:
            self._left = 0
        return self if number >= self._start else None

    def state(self, number: int) -> FileState | None:
        """All that there is to say of one file; None where the caller is to read it."""
        if number < self._start or (number == self._start and self._left > 0):
            return None
        self._all()
        return self._states.get(number)

    def close(self) -> None:
        """End the other process, if it has not ended, and wait until it has."""
        try:
            with _orders_held():
                self._end()
        finally:
            self._end()  # an order may have come just before they were held

    def _end(self) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
            self._pid = 0
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _all(self) -> dict[str, Decoded]:
        if self._descriptor >= 0:
            try:
                if self._ended():
                    self._found, self._states = _collected(self._descriptor)
            except (OSError, msgspec.MsgspecError):
                self._found, self._states = {}, {}
            finally:
                self.close()
        return self._found

    def _ended(self) -> bool:
        """Whether the other process did its work; waits for it as long as may be worth it."""
        watch = os.pidfd_open(self._pid)
        try:
            mine = time.monotonic() - self._began
            if self._idle is not None:
                self._idle()
            # select takes no number over 1023; a program that goes on with many sockets has higher ones.
            poll = select.poll()
            poll.register(watch, select.POLLIN)
            ready = poll.poll(1000 * (mine + _PATIENCE))
        finally:
            os.close(watch)
        if not ready:
            return False
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return status == 0


@contextlib.contextmanager
def _orders_held() -> Iterator[None]:
    """In this block no signal to end comes; it comes after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _ORDERS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def second_half(entries: Sequence[FileEntry], idle: Callable[[], None] | None = None) -> SecondHalf | None:
    """What another process is to read of these files, the second half by bytes; None where that is of no use.

    Args:
        entries: the files, in the order in which the caller reads them.
        idle: what to do when there is nothing to do but to wait for that process.

    Returns:
        What the process finds, once it is told to `begin`; to be closed.
    """
    total = sum(entry.stamp.size for entry in entries)
    if not WORTHWHILE <= total <= _TOO_MUCH or len(os.sched_getaffinity(0)) < 2:
        return None
    middle, start = int(total * _MINE), 0
    while start < len(entries) - 1 and middle >= entries[start].stamp.size:
        middle -= entries[start].stamp.size
        start += 1
    try:
        if sum(1 for _ in Path("/proc/self/task").iterdir()) > 1:
            return None  # a copy of a process with threads may wait for a lock that nobody holds
        descriptor = os.memfd_create("proxyd-manifests")
    except OSError:
        return None
    return SecondHalf(descriptor, entries, start, middle, idle)


def _read_half(
    descriptor: int, entries: Sequence[FileEntry], start: int, rules: Rules, first: int
) -> NoReturn:
    """The whole life of the other process."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for ending in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(ending, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ORDERS)
        signal.alarm(_LIFETIME)
        # It must not hold anything open that its parent closes: sockets, locks, channels of the workers.
        os.closerange(3, descriptor)
        os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))
        found: list[_Found] = []
        for number, entry in enumerate(entries, start):
            if not display(entry.path).lower().endswith(".json"):
                with contextlib.suppress(OSError, ValueError):
                    data, stamp = read_regular(entry.path)
                    found.append(_found(number, data, stamp, rules, first))
            first = 0
        with open(descriptor, "wb", closefd=False) as file:
            file.write(_ENCODER.encode(found))
        status = 0
    finally:
        os._exit(status)


class _First:
    """Has the documents that come first, up to so many characters."""

    def __init__(self, characters: int) -> None:
        self._left = characters

    def __contains__(self, text: object) -> bool:
        if self._left <= 0 or not isinstance(text, str):
            return False
        self._left -= len(text)
        return True


def _found(number: int, data: bytes, stamp: Stamp | None, rules: Rules, first: int) -> _Found:
    """What there is in a file, but for so many characters at its beginning."""
    found = _Found(number, stamp, digest(data), [], [], [])
    whole = not first and len(data) < LARGE
    keys = set()
    for document in read_documents(data, known=_First(first)):
        decoded = None
        if not isinstance(document, Unreadable) and document.value is not None:
            decoded = decode(document.value, rules)
        if decoded is None or decoded != Decoded(objects=decoded.objects, object_places=((),)):
            whole = False
            continue
        assert not isinstance(document, Unreadable)
        thing = decoded.objects[0]
        keys.add(key_of(thing))
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            found.things.append(msgspec.Raw(_ENCODER.encode(thing)))
            found.kinds.append(_NUMBERS[type(thing)])
            found.texts.append(document.text)
    if whole and len(keys) == len(found.things):
        found.texts.clear()
        found.whole = True
    return found


def _collected(descriptor: int) -> tuple[dict[str, Decoded], dict[int, FileState]]:
    data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    documents: dict[str, Decoded] = {}
    states: dict[int, FileState] = {}
    for one in msgspec.msgpack.decode(data, type=list[_Found]):
        things = [_DECODERS[kind].decode(raw) for kind, raw in zip(one.kinds, one.things, strict=True)]
        if one.whole:
            objects = {key_of(thing): thing for thing in things}
            states[one.number] = FileState(stamp=one.stamp, digest=one.digest, objects=objects)
        else:
            for text, thing in zip(one.texts, things, strict=True):
                documents[text] = Decoded(objects=(thing,), object_places=((),))
    return documents, states
