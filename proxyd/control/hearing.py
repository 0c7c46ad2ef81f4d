"""What becomes of what the workers say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from proxyd.control.runtime.logs import Summariser
from proxyd.control.workers.supervisor import Events
from proxyd.relay.ipc.messages import Connections, Failures

if TYPE_CHECKING:
    from proxyd.control.daemon import Daemon


class Hearing:
    """Listens for one daemon.

    Args:
        daemon: whose workers they are.
        said: says what happens often.
    """

    def __init__(self, daemon: Daemon, said: Summariser) -> None:
        self._daemon = daemon
        self._said = said

    def events(self) -> Events:
        """What the supervisor calls."""
        return Events(
            acknowledged=self._daemon.acknowledged,
            drained=self._drained,
            died=self._died,
            connections=self._connections,
            trouble=self._trouble,
            failures=self._failures,
        )

    def _drained(self, worker: int, numbers: list[int]) -> None:
        if self._daemon.reconciler.drained(worker, numbers):
            self._daemon.look_again()

    def _died(self, worker: int) -> None:
        self._daemon.observation.published()
        if self._daemon.reconciler.worker_died(worker):
            self._daemon.look_again()

    def _connections(self, message: Connections) -> None:
        self._daemon.access.write(message.records, message.dropped)

    def _failures(self, message: Failures) -> None:
        self._daemon.operations.history.failed(message.records)

    def _trouble(self, worker: int, counts: dict[str, int]) -> None:
        for text, count in counts.items():
            # One line for each Service and reason, however many endpoints it has.
            kind = re.sub(r"^endpoint \S+ of ", "", text)
            self._said.warning(kind, text, count=count, worker=abs(worker))  # negative: see LeavingWorkers
            self._daemon.observation.metrics.trouble(text, count)
