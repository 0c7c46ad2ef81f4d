"""Counts the requests to the API server and their durations, for the rest_client_* metrics."""

from __future__ import annotations

from bisect import bisect_left

# Upper bounds in seconds, as of client-go's rest_client_request_duration_seconds. A last bucket has none.
DURATION_BOUNDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)


class Durations:
    """A histogram: how many requests fell into each bucket, and their sum in seconds."""

    __slots__ = ("buckets", "total")

    def __init__(self) -> None:
        self.buckets = [0] * (len(DURATION_BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one request."""
        self.buckets[bisect_left(DURATION_BOUNDS, seconds)] += 1
        self.total += seconds


class RequestStats:
    """The requests so far.

    Attributes:
        requests: how many there were by status code (such as "200"; "<error>": no answer), method and host.
        durations: of each until the headers of the answer, by verb (GET, POST, PATCH) and host.
    """

    def __init__(self) -> None:
        self.requests: dict[tuple[str, str, str], int] = {}
        self.durations: dict[tuple[str, str], Durations] = {}

    def add(self, method: str, host: str, code: str, seconds: float) -> None:
        """Count one request."""
        key = (code, method, host)
        self.requests[key] = self.requests.get(key, 0) + 1
        self.durations.setdefault((method, host), Durations()).add(seconds)
