"""Health: whether changes are in force in time, and what /healthz and /livez answer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

# The age of what a worker has not acknowledged is known to this part of the timeout.
_SHARE = 20
_MAX_PENDING = 2 * _SHARE


class BusyError(Exception):
    """An address cannot be opened, and the daemon is to end for that; the text is one line."""


class HealthFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The health at one moment. Times are Unix seconds, 0 = never."""

    healthy: bool
    eligible: bool  # the node may get new load
    last_updated: float  # while healthy it is `now` (kubernetes pkg/proxy/healthcheck/proxy_health.go)
    now: float
    reasons: tuple[str, ...] = ()  # why it is not healthy


class Health:
    """Knows how old the oldest change is that is not in force.

    The daemon is healthy if no change has waited longer than `timeout` to be carried out, and no worker has
    left a generation unacknowledged for longer. A daemon that starts is healthy.

    Args:
        timeout: seconds; twice the sync period.
        clock: gives monotonic seconds.
        wall: gives Unix seconds.
    """

    def __init__(
        self,
        timeout: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.timeout = timeout
        self.eligible = True
        self._clock = clock
        self._wall = wall
        self._queued_at: float | None = None
        self._last_updated = 0.0
        # What some worker has not acknowledged: when it was first published, and the last generation of it.
        # Generations that are published within a share of the timeout are one entry, so there are few
        # entries.
        self._unacknowledged: deque[tuple[float, int]] = deque()

    def queued(self) -> None:
        """Something changed, and is to be carried out."""
        if self._queued_at is None:
            self._queued_at = self._clock()

    def updated(self) -> None:
        """Everything that was queued has been carried out."""
        self._queued_at = None
        self._last_updated = self._wall()

    def published(self, generation: int) -> None:
        """The workers were told a generation; or one of them was started again, and is told it anew."""
        now = self._clock()
        pending = self._unacknowledged
        if pending and (len(pending) >= _MAX_PENDING or now - pending[-1][0] < self.timeout / _SHARE):
            pending[-1] = (pending[-1][0], generation)
        else:
            pending.append((now, generation))

    def acknowledged(self, generation: int) -> None:
        """Every worker has acknowledged this generation."""
        pending = self._unacknowledged
        while pending and pending[0][1] <= generation:
            pending.popleft()

    def look(self) -> HealthFacts:
        """The health now."""
        reasons = []
        now = self._clock()
        if self._queued_at is not None and (age := now - self._queued_at) > self.timeout:
            reasons.append(f"a change has waited for {age:.0f} s to be carried out")
        if self._unacknowledged and (age := now - self._unacknowledged[0][0]) > self.timeout:
            reasons.append(f"a worker has not acknowledged a change for {age:.0f} s")
        wall = self._wall()
        return HealthFacts(
            healthy=not reasons,
            eligible=self.eligible,
            last_updated=self._last_updated if reasons else wall,
            now=wall,
            reasons=tuple(reasons),
        )


def healthz(facts: HealthFacts) -> tuple[int, bytes]:
    """Status and body of /healthz. It is 503 also if the node is not eligible for new load."""
    healthy = facts.healthy and facts.eligible
    return _answer(facts, healthy=healthy, more={"nodeEligible": facts.eligible})


def livez(facts: HealthFacts) -> tuple[int, bytes]:
    """Status and body of /livez: the node's eligibility does not matter."""
    return _answer(facts, healthy=facts.healthy, more={})


def _answer(facts: HealthFacts, *, healthy: bool, more: dict[str, object]) -> tuple[int, bytes]:
    updated = rfc3339(facts.now if healthy else facts.last_updated)
    body: dict[str, object] = {
        "lastUpdated": updated,
        "currentTime": rfc3339(facts.now),
        **more,
        "healthy": healthy,
        # One proxy serves both families.
        "status": {family: {"lastUpdated": updated, "healthy": facts.healthy} for family in ("IPv4", "IPv6")},
    }
    if facts.reasons:
        body["reasons"] = facts.reasons
    return (200 if healthy else 503), msgspec.json.encode(body)


def rfc3339(seconds: float) -> str:
    """A Unix time in RFC 3339; for 0, Go's zero time."""
    if not seconds:
        return "0001-01-01T00:00:00Z"
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
