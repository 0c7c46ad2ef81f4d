"""At most so many requests a second: a token bucket, as kube-proxy's --kube-api-qps and --kube-api-burst."""

from __future__ import annotations

import asyncio


class Throttle:
    """Lets `burst` requests through at once, and `qps` a second on average. Waiters go in the order they came."""

    def __init__(self, qps: float, burst: int) -> None:
        self._qps = qps
        self._burst = max(1, burst)
        self._free_at = float("-inf")  # when the bucket will be full again, on the loop's clock

    async def wait(self) -> None:
        """Returns when the next request may go. A `qps` of 0 or less: at once."""
        if self._qps <= 0:
            return
        now = asyncio.get_running_loop().time()
        # Each request moves the moment when the bucket is full again; the bucket holds `burst` of them.
        self._free_at = max(self._free_at, now) + 1 / self._qps
        delay = self._free_at - now - self._burst / self._qps
        if delay > 0:
            await asyncio.sleep(delay)
