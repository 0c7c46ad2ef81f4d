"""Orders to reload: however many come at once, one reading at a time and never more than one that waits."""

from __future__ import annotations

import asyncio

from proxyd.control.config.reload import Reloading


class Readings:
    """Readings that last until they are let go."""

    def __init__(self) -> None:
        self.begun = 0
        self.under_way = 0
        self._go = asyncio.Semaphore(0)

    async def read(self) -> None:
        self.begun += 1
        self.under_way += 1
        assert self.under_way == 1
        await self._go.acquire()
        self.under_way -= 1

    async def let_go(self) -> None:
        """End the one that is under way; the next one begins, if there is one."""
        self._go.release()
        await turns()


async def turns() -> None:
    """So many turns of the event loop that what can happen has happened."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_orders_that_come_at_once_are_one_reading() -> None:
    readings = Readings()
    reloading = Reloading(readings.read)
    for _ in range(300):
        reloading.ask()
    await turns()
    assert readings.begun == 1
    await readings.let_go()
    assert (readings.begun, readings.under_way) == (1, 0)


async def test_orders_that_come_during_a_reading_are_one_more() -> None:
    readings = Readings()
    reloading = Reloading(readings.read)
    reloading.ask()
    await turns()
    for _ in range(300):
        reloading.ask()
        await asyncio.sleep(0)
    assert readings.begun == 1
    await readings.let_go()
    assert (readings.begun, readings.under_way) == (2, 1)
    # The last of them counts as much as the first: it came before this one began.
    await readings.let_go()
    assert (readings.begun, readings.under_way) == (2, 0)
    reloading.ask()
    await turns()
    assert readings.begun == 3
    await readings.let_go()
