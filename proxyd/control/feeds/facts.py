"""What the sources say of themselves, for the admin API and for metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec


class SourceFacts(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One source of objects."""

    name: str  # "manifests config/demo"
    synced: bool = False  # it has delivered its first full list
    last_event: float = 0.0  # Unix time; 0 = none yet


class ClusterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted about the API server, copied at one moment."""

    requests: Mapping[tuple[str, str, str], int] = {}  # by code, method, host
    durations: Mapping[
        tuple[str, str], tuple[Sequence[int], float]
    ] = {}  # by verb, host: buckets, sum of seconds
    bounds: Sequence[float] = ()  # upper ones of the buckets; a last one without bound follows
    events_dropped: int = 0
    lists: int = 0
    problems: int = 0  # that last
    synced: bool = False
    last_event: float = 0.0  # Unix time; 0 = none yet
