"""Waiting until something is so: one deadline for everything, which holds on a machine that has ten times too much to do."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# Deadlines are this many times longer, for machines that are emulated.
PATIENCE = float(os.environ.get("PROXYD_TEST_PATIENCE", "1"))
LIMIT = 60.0
DEADLINE = LIMIT * PATIENCE  # of sockets and processes that tests wait for


class NotInTime(AssertionError):  # noqa: N818  a failed assertion
    """What was waited for did not happen."""


class _Wait(Generic[T]):
    """One wait: asks, and says how long to pause before the next time."""

    def __init__(self, condition: Callable[[], T | None], what: str, timeout: float) -> None:
        self._condition = condition
        self._what = what
        self._timeout = timeout * PATIENCE
        self._begin = time.monotonic()

    def ask(self) -> T | None:
        try:
            return self._condition()
        except Exception as error:
            error.add_note(f"while this was waited for: {self._named()}")
            raise

    def pause(self, last: object) -> float:
        waited = time.monotonic() - self._begin
        if waited > self._timeout:
            raise NotInTime(f"not within {self._timeout:g} s: {self._named()}; last: {last!r}")
        return min(0.002 + waited / 20, 0.1)

    def _named(self) -> str:
        return self._what or source_of(self._condition)


def source_of(condition: Callable[[], object]) -> str:
    """The source text of a condition, in one line."""
    try:
        return " ".join(inspect.getsource(condition).split())
    except (OSError, TypeError):
        return repr(condition)


def wait_for(
    condition: Callable[[], T | None], what: str = "", timeout: float = LIMIT, pause: float | None = None
) -> T:
    """What `condition` gives, as soon as it is true.

    Args:
        condition: is asked again and again.
        what: is waited for; else the condition's source text says it.
        timeout: in seconds, times PATIENCE.
        pause: between two questions, in seconds; else it grows with the time that has passed, to a tenth of a second.

    Raises:
        NotInTime: it did not become true.
    """
    wait = _Wait(condition, what, timeout)
    while not (value := wait.ask()):
        grown = wait.pause(value)
        time.sleep(grown if pause is None else pause)
    return value


async def eventually(condition: Callable[[], T | None], what: str = "", timeout: float = LIMIT) -> T:  # noqa: ASYNC109  as above
    """The same, while the event loop goes on."""
    wait = _Wait(condition, what, timeout)
    while not (value := wait.ask()):  # noqa: ASYNC110  what is waited for has no event of its own
        await asyncio.sleep(wait.pause(value))
    return value
