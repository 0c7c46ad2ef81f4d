"""The access log: one record for each finished connection, written by a thread of its own.

Neither the relays nor the control loop ever wait for it. Records queue up to a limit. If the file is slow,
full or missing, further records are dropped and counted; that is logged once, and so is the recovery.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from proxyd.control.runtime.logs import get_logger
from proxyd.control.runtime.signal_mask import block_daemon_signals
from proxyd.relay.ipc.messages import Connection

log = get_logger("access")

STDOUT = "-"
MAX_QUEUED = 20_000  # records; about 10 MB
RETRY_SECONDS = 1.0  # between two attempts to open a file that can't be opened
CLOSE_SECONDS = 1.0  # to write what is queued at the end
_AT_ONCE = 500  # records in one write
_MODE = 0o640
_POLL_SECONDS = 0.2


class AccessLog:
    """Writes connection records to a file as JSON lines, or to standard output ("-").

    Args:
        path: of the file; "" for none: then there is no thread, and everything is a no-op.
        max_queued: the most records that wait for the file.
    """

    def __init__(self, path: str, max_queued: int = MAX_QUEUED) -> None:
        self.path = path
        self.written = 0
        self._lost = 0  # counted by the caller: the queue was full, or the worker had no room
        self._failed = 0  # counted by the thread: the file could not be written
        self._max = max_queued
        self._queue: deque[Connection] = deque()
        self._said = False  # the present trouble has been logged
        self._said_at = 0  # how many records had been dropped before it
        self._wake = threading.Condition()
        self._reopen = bool(path)  # open it at once, so that a wrong path is logged at the start
        self._stop_at: float | None = None
        self._thread: threading.Thread | None = None
        if path:
            self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
            self._thread.start()

    @property
    def dropped(self) -> int:
        """Records that were lost, here or on their way here."""
        return self._lost + self._failed

    @property
    def queued(self) -> int:
        """Records that wait for the file."""
        return len(self._queue)

    def write(self, records: list[Connection], dropped: int = 0) -> None:
        """Queue records, without waiting. `dropped`: how many more were lost on their way here."""
        if self._thread is None:
            return
        with self._wake:
            room = max(0, self._max - len(self._queue))
            self._queue.extend(records[:room])
            lost = dropped + max(0, len(records) - room)
            self._lost += lost
            self._wake.notify()
            said, self._said = self._said, self._said or bool(lost)
        if lost and not said:
            self._said_at = self.dropped - lost
            log.error(
                "the access log is slower than connections end: records are dropped",
                path=self.path,
                waiting=self.queued,
            )

    def reopen(self) -> None:
        """Open the file anew, after it was rotated. Queued records go there."""
        with self._wake:
            self._reopen = True
            self._wake.notify()

    def close(self) -> None:
        """Write what is queued, for at most a second, and end the thread; one that hangs is abandoned."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with self._wake:
            self._stop_at = time.monotonic() + CLOSE_SECONDS
            self._wake.notify()
        thread.join(CLOSE_SECONDS + 2 * _POLL_SECONDS)

    # In the thread

    def _run(self) -> None:
        block_daemon_signals()
        sink = _Sink(self.path)
        try:
            while True:
                with self._wake:
                    while not (self._queue or self._reopen or self._stop_at is not None):
                        self._wake.wait()
                    if self._reopen:
                        self._reopen = False
                        # The rest of a record that was cut belongs to the old file.
                        sink.close()
                        sink = _Sink(self.path)
                    count = min(_AT_ONCE, len(self._queue))
                    records = [self._queue.popleft() for _ in range(count)]
                    stopping = self._stop_at is not None
                self._one_batch(sink, records)
                if stopping and (not self._queue or time.monotonic() > (self._stop_at or 0)):
                    return
        finally:
            sink.close()

    def _one_batch(self, sink: _Sink, records: list[Connection]) -> None:
        error = ""
        try:
            whole = sink.write(records, self._given_up)
        except OSError as failure:
            error, whole = failure.strerror or str(failure), sink.whole
        self.written += whole
        self._failed += len(records) - whole
        with self._wake:
            said = self._said
            if error and not said:
                self._said, self._said_at = True, self.dropped - len(records) + whole
            recovered = said and not error and records and len(self._queue) < self._max // 2
            if recovered:
                self._said = False
        if error and not said:
            log.error("the access log can't be written: records are dropped", path=self.path, error=error)
        if recovered:
            log.info("the access log is written again", path=self.path, dropped=self.dropped - self._said_at)

    def _given_up(self) -> bool:
        """Whether to stop waiting for the reader of a pipe."""
        return self._reopen or (self._stop_at is not None and time.monotonic() > self._stop_at)


class _Sink:
    """The open file. If a record was cut, its rest is written first when the file can be written again."""

    def __init__(self, path: str) -> None:
        self.whole = 0  # records of the last write that are in the file, or were begun and will be completed
        self._path = path
        self._fd = -1
        self._rest = b""
        self._next_try = 0.0
        self._last_error = OSError(errno.EIO, "not open")
        self._readable = path == STDOUT and os.isatty(1)
        self._encoder = msgspec.json.Encoder()
        if path == STDOUT:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stdout.flush()
            self._fd = 1

    def write(self, records: list[Connection], give_up: Callable[[], bool]) -> int:
        """Write records. Returns how many were written; fewer than given if `give_up()` returned true.

        Raises:
            OSError: writing failed; `whole` says how many were written.
        """
        self.whole = 0
        self._open()
        lines = [self._rest] if self._rest else []
        begun = len(lines)
        lines += [self._line(record) for record in records]
        data = memoryview(b"".join(lines))
        done = 0
        try:
            while done < len(data):
                try:
                    done += os.write(self._fd, data[done : done + 65536])
                except BlockingIOError:
                    if give_up():
                        break
                    self._wait_for_room()
        finally:
            self._account(lines, begun, done)
        return self.whole

    def close(self) -> None:
        """Close the file."""
        if self._fd > 2:
            os.close(self._fd)
        self._fd = -1

    def _open(self) -> None:
        if self._fd >= 0:
            return
        now = time.monotonic()
        if now < self._next_try:
            raise self._last_error
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            # O_NONBLOCK: opening or writing a FIFO that nobody reads must not block.
            self._fd = os.open(self._path, flags, _MODE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                error = OSError(errno.ENXIO, "nobody reads this pipe")
            self._next_try, self._last_error = now + RETRY_SECONDS, error
            raise error from None

    def _wait_for_room(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        poll.poll(_POLL_SECONDS * 1000)

    def _account(self, lines: list[bytes], begun: int, done: int) -> None:
        """Count the whole records, and keep the rest of one that was cut."""
        self._rest = b""
        for position, line in enumerate(lines):
            if done >= len(line):
                done -= len(line)
                self.whole += position >= begun
            elif done or position < begun:
                self._rest = line[done:]
                self.whole += position >= begun
                return
            else:
                return

    def _line(self, record: Connection) -> bytes:
        return readable(record).encode() if self._readable else self._encoder.encode(as_json(record)) + b"\n"


def as_json(record: Connection) -> dict[str, object]:
    """A record as the JSON log has it: camelCase, times in RFC 3339."""
    finished = datetime.fromtimestamp(record.finished, UTC).isoformat(timespec="milliseconds")
    # A record without `protocol` is of TCP: there may be thousands of them each second.
    more: dict[str, object] = {"protocol": record.protocol} if record.protocol else {}
    if record.streams[0]:
        more |= {"streamsIn": record.streams[0], "streamsOut": record.streams[1]}
        more |= {"messagesIn": record.messages[0], "messagesOut": record.messages[1]}
    return {
        "time": finished.replace("+00:00", "Z"),
        "client": record.client,
        "frontend": record.frontend,
        "service": record.service,
        "endpoint": record.endpoint,
        "attempts": record.attempts,
        "bytesIn": record.bytes_in,
        "bytesOut": record.bytes_out,
        "seconds": round(record.seconds, 6),
        "reason": record.reason,
        **more,
    }


def readable(record: Connection) -> str:
    """A record as a line for people."""
    attempts = f"  {record.attempts} attempts" if record.attempts > 1 else ""
    return (
        f"{record.service}  {record.client} -> {record.frontend} -> {record.endpoint or 'no endpoint'}  "
        f"{record.bytes_in} B in  {record.bytes_out} B out  "
        f"{record.seconds:.3f} s  {record.reason}{attempts}\n"
    )
