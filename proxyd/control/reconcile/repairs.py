"""When to look after what somebody else has removed, and what to say of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from proxyd.control.runtime.logs import get_logger

log = get_logger("reconciler")

# What is removed together comes in many messages.
QUICK_SECONDS = 0.05
# Whatever was removed more often than so many times within a minute is fought over.
TIMES = 5
WINDOW_SECONDS = 60.0
SLOW_SECONDS = 15.0


class Repairs:
    """Has the node looked at soon after somebody has removed something, and says what is put back.

    A fight, with a program that removes the same again and again, is said once and slowed down, until that
    program leaves it alone for a minute.

    Args:
        look: looks at the node. It is told which kinds of things may be gone, and returns what is, in words
            by kind.
        put_back: has what is gone put back.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        look: Callable[[frozenset[str]], Mapping[str, str]],
        put_back: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._look_at = look
        self._put_back = put_back
        self._clock = clock
        self._suspects: set[str] = set()
        self._times: dict[str, deque[float]] = {}  # when each kind was put back last
        self._fights: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0

    def suspect(self, kinds: Iterable[str]) -> None:
        """Something of these kinds may be gone: look soon."""
        self._suspects.update(kinds)
        if not self._suspects:
            return
        due = min(map(self._due, self._suspects))
        if self._timer is not None and self._timer_due <= due:
            return
        self.close()
        self._timer_due = due
        self._timer = asyncio.get_running_loop().call_later(due - self._clock(), self.look)

    def look(self) -> None:
        """Look now."""
        self.close()
        suspects, self._suspects = frozenset(self._suspects), set()
        lost = self._look_at(suspects)
        if lost:
            self.found(lost)
            self._put_back()

    def found(self, lost: Mapping[str, str]) -> None:
        """Note and say what is gone and will be put back now, by kind."""
        now = self._clock()
        said = []
        for kind, what in lost.items():
            times = self._times.setdefault(kind, deque(maxlen=TIMES + 1))
            if times and now - times[-1] > WINDOW_SECONDS:
                self._fights.discard(kind)
            times.append(now)
            if kind in self._fights:
                continue
            if len(times) <= TIMES or now - times[0] > WINDOW_SECONDS:
                said.append(what)
                continue
            self._fights.add(kind)
            log.warning(
                "somebody removes again and again what proxyd makes: it is put back less often from now on",
                what=what,
                every=f"{SLOW_SECONDS:.0f} s",
            )
        if said:
            log.warning("somebody has removed what proxyd had made: it is put back", what=", ".join(said))

    @property
    def fights(self) -> tuple[str, ...]:
        """The kinds that are fought over."""
        now = self._clock()
        return tuple(kind for kind in sorted(self._fights) if now - self._times[kind][-1] <= WINDOW_SECONDS)

    def close(self) -> None:
        """Look no more, unless something new happens."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self, kind: str) -> float:
        """When this kind is to be looked after."""
        now = self._clock()
        if kind in self.fights:
            return max(now, self._times[kind][-1] + SLOW_SECONDS)
        return now + QUICK_SECONDS
