"""The phases of a daemon: how it gets from starting to serving, and why and how fast it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from proxyd.control.runtime.logs import get_logger

log = get_logger("proxyd")

Phase = Literal["starting", "serving", "draining"]


class Lifecycle:
    """Where a daemon is between its start and its end, and the order to end.

    Args:
        on_stop: called once, when the end begins, with the seconds that relays have.
        on_stop_again: called for each further order to stop: relays are ended at once.

    Attributes:
        phase: nothing is opened or closed while "starting"; nothing is accepted any more while "draining".
        stop: set when serving is to end in this program.
        drain_seconds: how long relays may go on after that.
        fatal: why the daemon fails, in one line; "" if it does not.
        making_way: an upgrade was ordered: the next program is to go on when this one ends.
    """

    def __init__(self, on_stop: Callable[[float], None], on_stop_again: Callable[[], None]) -> None:
        self.phase: Phase = "starting"
        self.stop = asyncio.Event()
        self.drain_seconds = 0.0
        self.fatal = ""
        self.making_way = False
        self._on_stop = on_stop
        self._on_stop_again = on_stop_again

    @property
    def stopping(self) -> bool:
        """Whether serving is over, or about to be."""
        return self.stop.is_set()

    def stop_after(self, seconds: float) -> None:
        """Begin the end: relays have so many seconds. The second order ends them at once."""
        # An order to stop wins over an upgrade that is under way.
        making_way, self.making_way = self.making_way, False
        if self.stopping and not making_way:
            log.warning("stopping at once")
            self._on_stop_again()
            return
        log.info("stopping", drain_seconds=seconds)
        self.drain_seconds = seconds
        self._on_stop(seconds)
        self.phase = "draining"
        self.stop.set()

    def drain(self, seconds: float) -> float:
        """Stop after so many seconds, unless the end has begun. Returns how many seconds relays have."""
        if not self.stopping or self.making_way:
            self.stop_after(seconds)
        return self.drain_seconds

    def make_way(self, after: float) -> None:
        """End serving in this program `after` seconds from now; the next program then goes on."""
        self.making_way = True
        asyncio.get_running_loop().call_later(after, self.stop.set)

    def no_successor(self, drain: float) -> None:
        """The next program could not be executed: the daemon stops as after an order, and fails."""
        self.fatal = "stopped: the next program could not be executed"
        self.drain_seconds = drain
        self._on_stop(drain)

    def give_up(self, why: str) -> None:
        """Stop at once, and fail with a line that says why."""
        self.fatal = why
        self.stop_after(0.0)

    def failed(self, error: BaseException) -> None:
        """A task has ended that the daemon can't go on without."""
        self.give_up(f"stopped by an internal error: {error!r}")
