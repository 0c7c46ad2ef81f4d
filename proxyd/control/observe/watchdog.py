"""Checks every few seconds that the daemon does its work, and feeds systemd's watchdog if it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from proxyd.api.problems import Severity
from proxyd.control.core import Core
from proxyd.control.observe.systemd import Notifier
from proxyd.control.runtime.logs import get_logger
from proxyd.control.runtime.tasks import describe
from proxyd.state.spec import ListenerState

log = get_logger("watchdog")

TICK_SECONDS = 2.0
# If a reconcile is due for so many ticks, the loop hangs.
_MAX_WAITED = 7
# How much longer a start may take that waits for somebody else; the manager is told at each tick.
_WAIT_SECONDS = 60.0
# How long an end takes beyond the drain: the workers' own margin, netlink, nft.
_END_SECONDS = 15.0


class Watchdog:
    """Checks one daemon.

    At each tick every worker is asked for a sign of life, and one that gave none for long is replaced; both
    need no service manager. The manager is fed only while the event loop turns, a reconcile that is due
    happens, and every worker runs and answers: whatever hangs, it starts the daemon anew.

    Args:
        core: the daemon's parts.
        notifier: tells the service manager.
        due: whether the reconcile loop has something to do.
    """

    def __init__(self, core: Core, notifier: Notifier, due: Callable[[], bool]) -> None:
        self.wrong = ""  # what is wrong at the moment, in one line; "" if nothing is
        self._core = core
        self._notifier = notifier
        self._due = due
        every = notifier.watchdog_seconds / 2  # as sd_watchdog_enabled(3) advises
        self._feed_every = every
        self._tick_every = min(TICK_SECONDS, every / 2) if every else TICK_SECONDS
        self._fed = 0.0
        self._turns = -1
        self._waited = 0
        self._ready = False  # the start was reported
        self._reloads = 0  # reloads under way
        self._reloaded = False  # a reload's end is to be reported
        self._ending = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begin to check."""
        self._timer = self._loop.call_later(self._tick_every, self._tick)

    def close(self) -> None:
        """Stop checking, and tell the manager nothing more."""
        if self._timer is not None:
            self._timer.cancel()
        self._notifier.close()

    # What the daemon reports

    def in_force(self) -> None:
        """Everything that can be open is open, and every worker knows it."""
        if self._ending:
            return
        if not self._ready or (self._reloaded and not self._reloads):
            self._ready, self._reloaded = True, False
            self._notifier.ready(self.summary())

    def reloading(self) -> None:
        """A reload begins."""
        self._reloads += 1
        self._notifier.reloading()

    def reloaded(self) -> None:
        """Everything was read again. The reload ends when it is in force."""
        self._reloads -= 1
        self._reloaded = True

    def stopping(self, drain: float) -> None:
        """The end begins: relays may go on for `drain` seconds."""
        self._ending = True
        text = f"draining: connections may go on for {drain:g} s" if drain else "stopping"
        self._notifier.stopping(text, drain + _END_SECONDS)

    # What is seen

    def summary(self) -> str:
        """How many Services and listeners are served, and what is wrong, in one line."""
        core = self._core
        desired, failures = core.reconciler.desired, core.reconciler.failures
        unopened = [status.state for status in desired.unopened]
        failed = len(failures) + unopened.count(ListenerState.FAILED)
        conflicts = unopened.count(ListenerState.CONFLICT)
        errors = sum(problem.severity is Severity.ERROR for problem in core.feed.manifest_problems)
        parts = [
            _count(len(core.snapshot.services), "service"),
            _count(len(desired.host.listeners) - len(failures), "listener"),
            *([f"{failed} failed"] if failed else []),
            *([_count(conflicts, "conflict")] if conflicts else []),
            *([_count(errors, "error") + " in manifests"] if errors else []),
            *([self.wrong] if self.wrong else []),
        ]
        return f"serving: {', '.join(parts)}"

    def _tick(self) -> None:
        try:
            self._look()
        except Exception as error:  # noqa: BLE001 - whatever it is, the manager is not fed
            wrong = f"the health check failed: {describe(error)}"
            if wrong != self.wrong:
                log.error(wrong)  # noqa: TRY400 - one line is what an operator needs; it names the place
            self.wrong = wrong
        self._timer = self._loop.call_later(self._tick_every, self._tick)

    def _look(self) -> None:
        if self._ending:
            self.wrong = ""
        else:
            self._core.old_workers.probe()
            wrong = self._reconcile_waits() or self._core.supervisor.probe()
            if not self._ready:
                wrong = ""  # the manager has its own limit for a start
                if self._core.lifecycle.phase == "starting":
                    # It must not count the wait for an API server that is away: a restart would not bring
                    # that back.
                    missing = ", ".join(fact.name for fact in self._core.feed.facts if not fact.synced)
                    self._notifier.starting(f"waiting for the first list of {missing}", _WAIT_SECONDS)
            if wrong and wrong != self.wrong:
                log.warning("not healthy", why=wrong)
            self.wrong = wrong
            if self._ready and not self._reloads and self._notifier.listening:
                self._notifier.status(self.summary())
        self._notifier.retry()
        now = time.monotonic()
        if self._feed_every and not self.wrong and now - self._fed >= self._feed_every - self._tick_every:
            self._fed = now
            self._notifier.alive()

    def _reconcile_waits(self) -> str:
        turns, due = self._core.turns, self._due()
        self._waited = self._waited + 1 if due and turns == self._turns else 0
        self._turns = turns
        return "the reconcile loop does not run" if self._waited >= _MAX_WAITED else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
