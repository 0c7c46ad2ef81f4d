"""An event loop that a test turns by hand, by a clock that the test moves. Descriptors, and what comes of them, are real."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Self, TypeVar

import pytest

T = TypeVar("T")

DEADLINE = 30.0


class ManualLoop(asyncio.SelectorEventLoop):
    """What raises in a callback is raised by the turn that it happened in. Use as a context manager."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._raised: list[dict[str, Any]] = []
        super().__init__()
        self.set_exception_handler(lambda _, context: self._raised.append(context))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def time(self) -> float:
        return self.now

    def turn(self, times: int = 1) -> None:
        """Run what is ready and what is due; wait for nothing."""
        for _ in range(times):
            self.call_soon(self.stop)
            self.run_forever()
            if self._raised:
                context = self._raised.pop(0)
                raise context.get("exception") or AssertionError(context["message"])

    def call(self, make: Callable[[], T]) -> T:
        """What `make()` gives, called in a turn: for what asks for the running loop."""
        made: list[T] = []
        self.call_soon(lambda: made.append(make()))
        self.turn()
        return made[0]

    def advance(self, seconds: float) -> None:
        """Let time pass, and run what is due then."""
        self.now += seconds
        self.turn()

    def until(self, what: Callable[[], object]) -> None:
        """Turn until `what()` is true. For what the kernel or another process has to do first; the clock stands still."""
        end = time.monotonic() + DEADLINE
        turns = 0
        while not what():
            assert time.monotonic() < end, "it did not happen in time"
            self.turn()
            turns += 1
            if turns > 100:  # another process is to do something
                time.sleep(0.001)

    def rule(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        """Have modules take the time from this clock."""
        for module in modules:
            if hasattr(module, "monotonic"):
                monkeypatch.setattr(module, "monotonic", self.time)
            else:
                monkeypatch.setattr(module, "time", _Time(self.time))


class _Time:
    """The module `time`, but for its monotonic clock."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.monotonic = monotonic

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)
