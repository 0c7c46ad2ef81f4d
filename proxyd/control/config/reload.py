"""Reading everything again when that is asked for, and what a hang-up means."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from proxyd.control.runtime.tasks import spawn


class Reloading:
    """Reloads when asked: orders that come while one is carried out ask for one more, not for one each.

    Args:
        reload: reads everything again.
    """

    def __init__(self, reload: Callable[[], Awaitable[None]]) -> None:
        self._reload = reload
        self._asked = False
        self._task: asyncio.Task[None] | None = None

    def ask(self) -> None:
        """Reload soon; nobody waits for it."""
        self._asked = True
        if self._task is None or self._task.done():
            self._task = spawn(self._as_asked(), name="reload")

    async def _as_asked(self) -> None:
        while self._asked:
            self._asked = False
            await self._reload()


def has_terminal() -> bool:
    """Whether this process has a terminal that lives."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
