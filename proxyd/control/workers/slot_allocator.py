"""Allocates the rows of the shared slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from proxyd.relay.ipc.slots import MAX_SLOTS, Slots

SPARE = 0  # the row that owners share when all others are taken


class SlotAllocator:
    """Hands out rows of the shared slots to owners, and takes them back.

    A row that was given back is reused as late as possible: relays of its old owner may still count in it.
    """

    def __init__(self, slots: Slots, rows: int = MAX_SLOTS) -> None:
        self._slots = slots
        self._rows = rows
        self._next = SPARE + 1
        self._freed: deque[int] = deque()
        self._owned: dict[Hashable, int] = {}

    def take(self, owner: Hashable) -> int:
        """The owner's row; a new one the first time, `SPARE` if all are taken."""
        slot = self._owned.get(owner)
        if slot is not None:
            return slot
        if self._next < self._rows:
            slot = self._next
            self._next += 1
        elif self._freed:
            slot = self._freed.popleft()
            self._slots.clear(slot)
        else:
            return SPARE
        self._owned[owner] = slot
        return slot

    def get(self, owner: Hashable) -> int | None:
        """The owner's row; None if it has none."""
        return self._owned.get(owner)

    def give_back(self, owner: Hashable) -> None:
        """Take the owner's row back."""
        slot = self._owned.pop(owner, None)
        if slot is not None:
            self._freed.append(slot)

    def rows(self) -> range:
        """Every row that was ever handed out, the spare one included."""
        return range(self._next)
