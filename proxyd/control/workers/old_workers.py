"""Workers of the programs before an upgrade: they drain, and end with their last relay."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

from proxyd.control.runtime.logs import get_logger
from proxyd.control.workers.handover import DrainingWorker
from proxyd.control.workers.supervisor import MAX_UNANSWERED
from proxyd.relay.ipc.channel import Channel, ChannelError
from proxyd.relay.ipc.messages import Apply, CloseListener, Drained, Shutdown, ToWorker
from proxyd.state.spec import ListenerKey

log = get_logger("upgrade")

# How many there may be. After many upgrades, those that have drained for the longest time are ended with
# their relays.
MAX_WORKERS = 32
# How long a relay may outlive an upgrade.
KEEP_SECONDS = 7 * 86400.0
# A worker that leaves this many messages unread does not read: it is ended.
MAX_QUEUED = 1000
_RETRY_SECONDS = 0.1
_CLOSES_AT_ONCE = 2000


@dataclass(slots=True, eq=False)
class _Worker:
    pid: int
    pidfd: int
    channel: Channel
    listeners: dict[
        int, list[ListenerKey]
    ]  # those that it may have relays of, by their number in that worker
    told: set[int] = field(default_factory=set)  # numbers of listeners whose relays it was told to end
    outgoing: deque[ToWorker] = field(default_factory=deque)
    retry: asyncio.TimerHandle | None = None  # sends what is in `outgoing`
    retired: bool = False
    unanswered: int = 0  # probes since its last message


class DrainingWorkers:
    """Control's end of their channels, until the last of them has ended.

    Args:
        workers: those that were handed over.
        heard: takes the number of a worker and a message of it, all but `Drained`. The number is the negative
            pid: in a container pids are as low as the numbers of this program's own workers.
        drained: called when an address may be free, because the last relay of a listener, or a worker, has
            ended.
        gone: takes the number of a worker that has ended.
    """

    def __init__(
        self,
        workers: Iterable[DrainingWorker],
        heard: Callable[[int, object], None],
        drained: Callable[[], None],
        gone: Callable[[int], None],
    ) -> None:
        self._heard = heard
        self._drained = drained
        self._ended = gone
        self._workers: dict[
            int, _Worker
        ] = {}  # by pid, which is not reused before the process was waited for
        self._gone = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for one in workers:
            self._adopt(one)

    def __len__(self) -> int:
        """How many there still are."""
        return len(self._workers)

    @property
    def pids(self) -> tuple[int, ...]:
        """The pids of their processes."""
        return tuple(self._workers)

    def retire(self) -> None:
        """Have them accept no more: other workers have taken their place."""
        for worker in list(self._workers.values()):
            if not worker.retired:
                worker.retired = True
                self._send(worker, Shutdown(KEEP_SECONDS))

    def keys(self) -> set[ListenerKey]:
        """The addresses that their relays may need."""
        return {
            key for worker in self._workers.values() for keys in worker.listeners.values() for key in keys
        }

    def let_go(self, wanted: Container[ListenerKey], seconds: float) -> None:
        """Have them end, after so many seconds, the relays of addresses that are no longer wanted."""
        for worker in list(self._workers.values()):
            over = [
                number
                for number, keys in worker.listeners.items()
                if number not in worker.told and not any(key in wanted for key in keys)
            ]
            worker.told.update(over)
            for first in range(0, len(over), _CLOSES_AT_ONCE):
                close = [CloseListener(number, seconds) for number in over[first : first + _CLOSES_AT_ONCE]]
                self._send(worker, Apply(0, last=False, close=close))

    def tell(self, message: ToWorker) -> set[int]:
        """Send a message to all of them. Returns their numbers, as `heard` gets them."""
        for worker in list(self._workers.values()):
            self._send(worker, message)
        return {-pid for pid in self._workers}

    def probe(self) -> None:
        """Send each an empty update to acknowledge. One that has answered none for long is ended."""
        for worker in list(self._workers.values()):
            worker.unanswered += 1
            if worker.unanswered > MAX_UNANSWERED:
                log.error(
                    "a worker of an earlier program does not answer: it ends with its connections",
                    pid=worker.pid,
                )
                self._remove(worker)
            else:
                self._send(worker, Apply(0, last=True))

    async def stop(self, drain: float) -> None:
        """Let them finish for at most `drain` seconds, then end them."""
        self.tell(Shutdown(drain))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain + 2.0):
                while self._workers:
                    self._gone.clear()
                    await self._gone.wait()
        self.kill()

    def kill(self) -> None:
        """End them at once."""
        for worker in list(self._workers.values()):
            self._remove(worker)

    def end(self, pid: int) -> None:
        """End one of them at once."""
        if (worker := self._workers.get(pid)) is not None:
            self._remove(worker)

    def hand_over(self) -> list[DrainingWorker]:
        """Describe them for the next program, those that have drained for the longest time first."""
        return [
            DrainingWorker(
                worker.pid,
                worker.channel.fileno(),
                [(number, *key) for number, keys in worker.listeners.items() for key in keys],
            )
            for worker in self._workers.values()
        ]

    def _adopt(self, one: DrainingWorker) -> None:
        channel = Channel(socket.socket(fileno=one.channel))
        try:
            pidfd = os.pidfd_open(one.pid)
        except OSError:  # it has ended, and the program before has waited for it
            channel.close()
            return
        listeners: dict[int, list[ListenerKey]] = {}
        for number, ip, port, protocol in one.listeners:
            listeners.setdefault(number, []).append(ListenerKey(ip, port, protocol))
        worker = self._workers[one.pid] = _Worker(one.pid, pidfd, channel, listeners)
        self._loop.add_reader(pidfd, self._remove, worker)
        self._loop.add_reader(channel.fileno(), self._readable, worker)

    def _send(self, worker: _Worker, message: ToWorker) -> None:
        worker.outgoing.append(message)
        if worker.retry is None:
            self._flush(worker)
        if len(worker.outgoing) > MAX_QUEUED:
            log.error(
                "a worker of an earlier program does not read: it ends with its connections", pid=worker.pid
            )
            self._remove(worker)

    def _flush(self, worker: _Worker) -> None:
        worker.retry = None
        while worker.outgoing:
            try:
                if not worker.channel.send(worker.outgoing[0]):
                    worker.retry = self._loop.call_later(_RETRY_SECONDS, self._flush, worker)
                    return
            except OSError:
                worker.outgoing.clear()  # it has ended, which the pidfd reports
                return
            worker.outgoing.popleft()

    def _readable(self, worker: _Worker) -> None:
        for _ in range(64):
            try:
                received = worker.channel.receive()
            except EOFError:
                self._loop.remove_reader(worker.channel.fileno())
                return
            except ChannelError as error:
                # A message that only its own program understands is a sign of life too.
                log.debug("from a worker of an earlier program", pid=worker.pid, error=str(error))
                worker.unanswered = 0
                continue
            if received is None:
                return
            worker.unanswered = 0
            if isinstance(received[0], Drained):
                for number in received[0].listeners:
                    worker.listeners.pop(number, None)
                self._drained()
            else:
                self._heard(-worker.pid, received[0])

    def _remove(self, worker: _Worker) -> None:
        if self._workers.pop(worker.pid, None) is None:
            return
        if worker.retry is not None:
            worker.retry.cancel()
        worker.outgoing.clear()
        self._loop.remove_reader(worker.pidfd)
        self._loop.remove_reader(worker.channel.fileno())
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(worker.pid, 0)
        os.close(worker.pidfd)
        worker.channel.close()
        self._ended(-worker.pid)
        self._gone.set()
        self._drained()
