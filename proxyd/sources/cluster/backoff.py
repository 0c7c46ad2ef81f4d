"""Pauses between failed attempts: they grow up to a bound, with jitter so that nodes do not ask in step."""

from __future__ import annotations

import random

# Seconds. A server that says how long to wait is heeded up to LONGEST_ASKED.
FIRST, LONGEST, LONGEST_ASKED = 0.25, 30.0, 120.0


class Backoff:
    """Chooses the pause after each failure."""

    __slots__ = ("_first", "_longest", "_next", "failures")

    def __init__(self, first: float = FIRST, longest: float = LONGEST) -> None:
        self._first, self._longest = first, longest
        self._next = first
        self.failures = 0

    def pause(self, asked: float = 0) -> float:
        """Seconds to wait after this failure; at least `asked`, the server's wish (0: it has none)."""
        self.failures += 1
        base, self._next = self._next, min(self._next * 2, self._longest)
        wait = base * random.uniform(0.5, 1)  # noqa: S311  not a secret
        if asked > 0:
            return min(max(wait, asked), LONGEST_ASKED) * random.uniform(1, 1.1)  # noqa: S311  not a secret
        return wait

    def reset(self) -> None:
        """Begin with the shortest pause again: an attempt has succeeded."""
        self._next = self._first
        self.failures = 0
