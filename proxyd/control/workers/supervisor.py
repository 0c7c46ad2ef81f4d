"""Starts the workers, tells them every update, starts them again when they die."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from proxyd.control.runtime.logs import Summariser, get_logger
from proxyd.control.workers.live_connections import LiveQuery
from proxyd.control.workers.publication import Held, Publication, Update, still_open
from proxyd.relay.ipc.channel import Channel, ChannelError, send_much
from proxyd.relay.ipc.messages import (
    Acknowledged,
    Apply,
    Connection,
    Connections,
    Drained,
    Failure,
    Failures,
    ListConnections,
    LiveConnections,
    Ready,
    Shutdown,
    ToWorker,
    Trouble,
)
from proxyd.relay.ipc.options import Options
from proxyd.relay.ipc.slots import CLOSED, FIELDS, MAX_SLOTS, OPENED, Slots

log = get_logger("supervisor")

# A worker that leaves this many messages unread does not read: it is replaced.
MAX_QUEUED = 20_000
# A worker that leaves more probes unanswered than the first counts as silent; more than the second, and it is
# replaced.
SILENT_PROBES = 4
MAX_UNANSWERED = 7
# For a worker that has not said yet that it runs. On a busy machine the start of Python takes long,
# and that of the next worker would take as long.
MAX_UNANSWERED_AT_START = 30
# A worker that lived this long is started again at once. One that keeps dying is started again after a pause
# that grows, and is below a second until its fourth death.
STEADY_SECONDS = 10.0
MAX_PAUSE_SECONDS = 5.0


@dataclass(slots=True)
class Events:
    """What the supervisor reports, each from within the event loop."""

    acknowledged: Callable[[], None]
    drained: Callable[[int, list[int]], None]  # worker, listener numbers
    died: Callable[[int], None]  # worker
    connections: Callable[[list[Connection], int], None]  # finished connections, and how many more were lost
    trouble: Callable[[int, Trouble], None]  # worker
    failures: Callable[[list[Failure]], None]


@dataclass(slots=True, eq=False)
class Worker:
    """One worker process, as control sees it."""

    index: int
    process: subprocess.Popen[bytes] | None
    pidfd: int
    channel: Channel
    started: float
    ready: bool = False
    acknowledged: int = 0
    unanswered: int = 0  # probes since it last acknowledged anything
    outgoing: deque[tuple[ToWorker, list[Held]]] = field(default_factory=deque)
    writing: bool = False

    @property
    def pid(self) -> int:
        """Its process; control's own with --workers=0."""
        return self.process.pid if self.process else os.getpid()


class Supervisor:
    """Owns the worker processes and the channels to them.

    Args:
        count: of worker processes; 0 for one worker inside control.
        slots: counters that it shares with them.
        publication: what they are told.
        options: what they are started with.
        summariser: logs what may happen over and over.
    """

    def __init__(
        self,
        count: int,
        slots: Slots,
        publication: Publication,
        options: Options,
        *,
        summariser: Summariser,
    ) -> None:
        self.count = count
        self.restarts: dict[int, int] = {}
        self.workers: dict[int, Worker] = {}
        self.live_query = LiveQuery(self._ask)
        self._slots = slots
        self._publication = publication
        self._options = options
        self._events: Events
        self._summariser = summariser
        self._deaths: dict[int, int] = {}
        self._starts: dict[int, asyncio.TimerHandle] = {}  # of workers that are to be started again
        self._stopping = False
        self._gone = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def start(self, events: Events) -> None:
        """Start every worker.

        Args:
            events: called when they say something.

        Raises:
            OSError: a process or a channel could not be made.
        """
        self._events = events
        for index in range(max(self.count, 1)):
            self._spawn(index)

    def publish(self, update: Update) -> None:
        """Send an update to every worker."""
        for worker in list(self.workers.values()):
            self._tell(worker, update)

    def lagging(self) -> bool:
        """Whether a worker has not acknowledged the newest generation, or is missing."""
        newest = self._publication.generation
        return len(self.workers) < max(self.count, 1) or any(
            not worker.ready or worker.acknowledged < newest for worker in self.workers.values()
        )

    def telling(self) -> bool:
        """Whether there is something left to send to a worker."""
        return any(worker.outgoing for worker in self.workers.values())

    def probe(self) -> str:
        """Send every worker an empty update to acknowledge, and replace a worker that answers none for long.

        Returns:
            What is wrong with the workers in one line; "" where all run and answer.
        """
        for worker in list(self.workers.values()):
            worker.unanswered += 1
            if worker.unanswered > (MAX_UNANSWERED if worker.ready else MAX_UNANSWERED_AT_START):
                log.error("worker does not answer: it is replaced", worker=worker.index, pid=worker.pid)
                self._remove(worker)
        self.publish(Update(self._publication.generation))
        count = max(self.count, 1)
        running = [worker for worker in self.workers.values() if worker.ready]
        if len(running) < count:
            return f"{count - len(running)} of {count} workers do not run"
        silent = sum(worker.unanswered > SILENT_PROBES for worker in running)
        return f"{silent} of {count} workers do not answer" if silent else ""

    def acknowledged(self) -> int:
        """The newest generation that every worker has acknowledged; -1 if a worker is missing."""
        if len(self.workers) < max(self.count, 1):
            return -1
        return min(worker.acknowledged if worker.ready else -1 for worker in self.workers.values())

    async def stop(self, drain: float) -> None:
        """Let the workers finish what they relay, for at most `drain` seconds, then end them."""
        self._start_none()
        for worker in list(self.workers.values()):  # one that does not read is taken out
            worker.outgoing.append((Shutdown(drain), []))
            self._flush(worker)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain + 2.0):
                while self.workers:
                    self._gone.clear()
                    await self._gone.wait()
        self.kill()

    def kill(self) -> None:
        """End every worker at once."""
        self._start_none()
        for worker in list(self.workers.values()):
            self._remove(worker)

    def _start_none(self) -> None:
        self._stopping = True
        for timer in self._starts.values():
            timer.cancel()

    def _spawn(self, index: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        send_much(ours)
        make = self._in_process if self.count == 0 else self._process
        try:
            with theirs:
                worker = make(index, ours, theirs)
        except OSError:
            ours.close()
            raise
        self.workers[index] = worker
        self._loop.add_reader(worker.channel.fileno(), self._readable, worker)
        self._tell(worker, self._publication.full())

    def _process(self, index: int, ours: socket.socket, theirs: socket.socket) -> Worker:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [
                sys.executable,
                "-m",
                "proxyd.relay.worker",
                f"--channel-fd={theirs.fileno()}",
                f"--slots-fd={self._slots.fd}",
                f"--index={index}",
                f"--options={self._options.encode()}",
            ],
            pass_fds=(theirs.fileno(), self._slots.fd),
            stdin=subprocess.DEVNULL,
            process_group=0,  # out of reach of a terminal's Ctrl-C: control decides when they end
        )
        pidfd = os.pidfd_open(process.pid)
        worker = Worker(index, process, pidfd, Channel(ours), time.monotonic())
        self._loop.add_reader(pidfd, self._exited, worker)
        return worker

    def _in_process(self, index: int, ours: socket.socket, theirs: socket.socket) -> Worker:
        # Only with --workers=0 does control import the data plane.
        import proxyd.relay.worker as data_plane  # noqa: PLC0415

        data_plane.Worker(self._loop, Channel(theirs.dup()), self._slots, index, self._options).start()
        return Worker(index, None, -1, Channel(ours), time.monotonic())

    def _tell(self, worker: Worker, update: Update) -> None:
        worker.outgoing.extend(self._publication.parts(update, worker.index))
        self._flush(worker)

    def _ask(self, question: ListConnections) -> set[int]:
        """Ask every worker that runs. Returns their numbers."""
        asked = [worker for worker in self.workers.values() if worker.ready]
        for worker in asked:
            worker.outgoing.append((question, []))
        numbers = {worker.index for worker in asked}
        for worker in asked:
            self._flush(worker)
        return numbers

    def _flush(self, worker: Worker) -> None:
        outgoing = worker.outgoing
        later = False
        while outgoing:
            message, listeners = outgoing[0]
            descriptors: list[int] = []
            if isinstance(message, Apply):
                message, descriptors = still_open(message, listeners)
            try:
                if not worker.channel.send(message, descriptors):
                    break
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    # The kernel bounds the descriptors that are under way between processes.
                    later = True
                    break
                # It has died, which the pidfd reports.
                outgoing.clear()
                break
            outgoing.popleft()
        if len(outgoing) > MAX_QUEUED:
            log.error("worker does not read its updates: it is replaced", worker=worker.index, pid=worker.pid)
            self._remove(worker)
            return
        if later:
            self._loop.call_later(0.01, self._flush_if_alive, worker)
        waiting = bool(outgoing) and not later
        if waiting != worker.writing:
            worker.writing = waiting
            if worker.writing:
                self._loop.add_writer(worker.channel.fileno(), self._flush, worker)
            else:
                self._loop.remove_writer(worker.channel.fileno())

    def _flush_if_alive(self, worker: Worker) -> None:
        if self.workers.get(worker.index) is worker:
            self._flush(worker)

    def _readable(self, worker: Worker) -> None:
        try:
            for message in self._messages(worker):
                self._heard(worker, message)
        except (OSError, EOFError, ChannelError):
            self._loop.remove_reader(worker.channel.fileno())
            if worker.process is None:
                self._remove(worker)

    def _messages(self, worker: Worker) -> Iterator[object]:
        for _ in range(64):
            received = worker.channel.receive()
            if received is None:
                return
            yield received[0]

    def _heard(self, worker: Worker, message: object) -> None:
        match message:
            case Ready():
                worker.ready = True
                worker.unanswered = 0
                log.debug("worker runs", worker=worker.index, pid=worker.pid)
            case Acknowledged(generation=generation):
                worker.acknowledged = generation
                worker.unanswered = 0
                self._events.acknowledged()
            case Drained(listeners=listeners):
                self._events.drained(worker.index, listeners)
            case _:
                self.heard(worker.index, message)

    def heard(self, number: int, message: object) -> None:
        """What a worker reports of its relays, be it one of an earlier program."""
        match message:
            case Connections():
                self._events.connections(message.records, message.dropped)
            case LiveConnections():
                self.live_query.answered(number, message)
            case Failures():
                self._events.failures(message.records)
            case Trouble():
                self._events.trouble(number, message)
            case Ready() | Acknowledged():
                pass  # an old worker answers what its own program sent
            case _:
                log.error("unexpected message from a worker", worker=number)

    def _exited(self, worker: Worker) -> None:
        assert worker.process is not None
        code = worker.process.wait()
        if not self._stopping:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._summariser.error(
                f"worker {worker.index} died",
                "worker died: it is started again, its relays are lost",
                worker=worker.index,
                how=how,
            )
        self._remove(worker)

    def _remove(self, worker: Worker) -> None:
        """Take a worker out, ended if it still runs, and start it again unless everything stops."""
        if self.workers.get(worker.index) is not worker:
            return
        del self.workers[worker.index]
        worker.outgoing.clear()
        self._loop.remove_reader(worker.channel.fileno())
        self._loop.remove_writer(worker.channel.fileno())
        worker.channel.close()
        if worker.process is not None:
            self._loop.remove_reader(worker.pidfd)
            os.close(worker.pidfd)
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
        self._settle_counters(worker.index)
        self.live_query.worker_gone(worker.index)
        self._events.died(worker.index)
        self._gone.set()
        if self._stopping:
            return
        self.restarts[worker.index] = self.restarts.get(worker.index, 0) + 1
        steady = time.monotonic() - worker.started > STEADY_SECONDS
        deaths = self._deaths[worker.index] = 0 if steady else self._deaths.get(worker.index, 0) + 1
        pause = 0.0 if deaths <= 1 else min(0.05 * 2**deaths, MAX_PAUSE_SECONDS)
        self._start_after(pause, worker.index)

    def _start_after(self, seconds: float, index: int) -> None:
        self._starts[index] = self._loop.call_later(seconds, self._start_again, index)

    def _start_again(self, index: int) -> None:
        del self._starts[index]
        try:
            self._spawn(index)
        except OSError as error:
            log.warning("worker can't be started: tried again in 5 s", worker=index, error=str(error))
            self._start_after(MAX_PAUSE_SECONDS, index)

    def _settle_counters(self, index: int) -> None:
        """What a dead worker had open is closed."""
        view = self._slots.view
        first = MAX_SLOTS + index * MAX_SLOTS * FIELDS
        for row in self._publication.rows():
            base = first + row * FIELDS
            if view[base + CLOSED] != view[base + OPENED]:
                view[base + CLOSED] = view[base + OPENED]
