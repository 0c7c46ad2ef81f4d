"""A token bucket that limits requests a second, as kube-proxy's --kube-api-qps and --kube-api-burst do."""

from __future__ import annotations

import asyncio


class Throttle:
    """Admits `burst` requests at once and `qps` a second on average, in the order in which they came."""

    def __init__(self, qps: float, burst: int) -> None:
        self._qps = qps
        self._burst = max(1, burst)
        self._free_at = float("-inf")  # when the bucket will be full again, on the loop's clock

    async def wait(self) -> None:
        """Return when the next request may go: at once if `qps` is 0 or less."""
        if self._qps <= 0:
            return
        now = asyncio.get_running_loop().time()
        # Each request puts off the moment when the bucket is full again; the bucket holds `burst` requests.
        self._free_at = max(self._free_at, now) + 1 / self._qps
        delay = self._free_at - now - self._burst / self._qps
        if delay > 0:
            await asyncio.sleep(delay)
