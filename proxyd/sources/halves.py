"""A second process that reads half of many manifests: parsing is pure work, and the first load is waited for."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from proxyd.api.decode import Decoded, KubeObject, decode
from proxyd.api.discovery import Endpoints, EndpointSlice
from proxyd.api.pod import Pod
from proxyd.api.rules import Rules
from proxyd.api.service import Service
from proxyd.sources.documents import Unreadable, read_documents
from proxyd.sources.files import FileEntry, display
from proxyd.sources.regular import read_regular

# Bytes of all files together from which a second process saves more than it costs.
WORTHWHILE = 512 << 10
# From here on memory counts for more: it takes as much once more.
_TOO_MUCH = 64 << 20
# The share that the caller reads. Starting a process and handing over what it found take time too.
_MINE = 0.5
# The other half is as large as one's own: one that takes this much longer is not coming.
_PATIENCE = 1.0  # seconds
_LIFETIME = 60  # seconds that the second process may run, whatever becomes of the first

_KINDS = (Service, Endpoints, EndpointSlice, Pod)
_DECODERS: list[msgspec.msgpack.Decoder[Any]] = [msgspec.msgpack.Decoder(kind) for kind in _KINDS]
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}


class _Found(msgspec.Struct, array_like=True, gc=False):
    """A document without problems that holds one object."""

    text: str
    kind: int  # in _KINDS
    thing: msgspec.Raw


class SecondHalf(Mapping[str, Decoded]):
    """What the documents of the second half hold, by their text, as `parse_file` takes it.

    Asked in order for the documents of the first half it has none of them; asked for more it waits for the other
    process. It may lack any document: what it lacks, the caller reads.

    Args:
        pid: of the other process.
        descriptor: of the file that it writes to.
        start: number of the first file that it reads.
        first: characters of documents in that file that it leaves to the caller.
    """

    def __init__(self, pid: int, descriptor: int, start: int, first: int) -> None:
        self._pid = pid
        self._descriptor = descriptor
        self._start = start
        self._left = first
        self._began = time.monotonic()
        self._found: dict[str, Decoded] = {}

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

    def close(self) -> None:
        """End the other process, if it has not ended."""
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
                    self._found = _collected(self._descriptor)
            except (OSError, msgspec.MsgspecError):
                self._found = {}
            finally:
                self.close()
        return self._found

    def _ended(self) -> bool:
        """Whether the other process did its work; waits for it as long as may be worth it."""
        watch = os.pidfd_open(self._pid)
        try:
            mine = time.monotonic() - self._began
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


def second_half(entries: Sequence[FileEntry], rules: Rules) -> SecondHalf | None:
    """Have another process read the second half of these files, by bytes; None where that is of no use.

    Args:
        entries: the files, in the order in which the caller reads them.
        rules: what is valid.

    Returns:
        What the process finds; to be closed.
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
    try:
        pid = os.fork()
    except OSError:
        os.close(descriptor)
        return None
    if pid == 0:
        _read_half(descriptor, entries[start:], rules, middle)
    return SecondHalf(pid, descriptor, start, middle)


def _read_half(descriptor: int, entries: Sequence[FileEntry], rules: Rules, first: int) -> NoReturn:
    """The whole life of the other process."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(_LIFETIME)
        # It must not hold anything open that its parent closes: sockets, locks, channels of the workers.
        os.closerange(3, descriptor)
        os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))
        found: list[_Found] = []
        encoder = msgspec.msgpack.Encoder()
        for entry in entries:
            label = display(entry.path)
            if label.lower().endswith(".json"):
                continue
            with contextlib.suppress(OSError, ValueError):
                data, _ = read_regular(entry.path)
                for text, thing in _clean(data, rules, first):
                    with contextlib.suppress(ValueError, TypeError, OverflowError):
                        raw = msgspec.Raw(encoder.encode(thing))
                        found.append(_Found(text, _NUMBERS[type(thing)], raw))
            first = 0
        with open(descriptor, "wb", closefd=False) as file:
            file.write(encoder.encode(found))
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


def _clean(data: bytes, rules: Rules, first: int) -> Iterator[tuple[str, KubeObject]]:
    """The text of each document that holds one object and has no problem, and the object."""
    for document in read_documents(data, known=_First(first)):
        if isinstance(document, Unreadable) or document.value is None:
            continue
        decoded = decode(document.value, rules)
        if decoded == Decoded(objects=decoded.objects, object_places=((),)):
            yield document.text, decoded.objects[0]


def _collected(descriptor: int) -> dict[str, Decoded]:
    data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    return {
        one.text: Decoded(objects=(_DECODERS[one.kind].decode(one.thing),), object_places=((),))
        for one in msgspec.msgpack.decode(data, type=list[_Found])
    }
