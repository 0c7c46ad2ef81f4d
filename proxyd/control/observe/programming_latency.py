"""Network programming latency: the time from a change of a Service's endpoints until all workers have it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

from proxyd.api.discovery import EndpointSlice
from proxyd.api.meta import ObjectName

# Annotation of slices and Endpoints: when the Pod or Service changed that led to their last change.
TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"

# Changes that wait for the workers; beyond that the oldest are not measured.
_MAX_WAITING = 20_000
_Slices = tuple[EndpointSlice, ...]


class ProgrammingLatency:
    """Measures changes as kube-proxy does (kubernetes pkg/proxy/endpointschangetracker.go).

    Each new trigger time of a Service's slices is one change; it ends when every worker has acknowledged it.
    A trigger time from before this daemon began does not count: that change was carried out by somebody else,
    long ago.

    Args:
        observe: takes the seconds of one change.
        clock: Unix time.
    """

    def __init__(self, observe: Callable[[float], None], clock: Callable[[], float] = time.time) -> None:
        self._observe = observe
        self._clock = clock
        self._began = clock()
        # Trigger times that no reconcile has seen, and those that workers were told, each with its
        # generation.
        self._changed: deque[float] = deque(maxlen=_MAX_WAITING)
        self._told: deque[tuple[int, float]] = deque(maxlen=_MAX_WAITING)

    def changed(
        self,
        names: Iterable[ObjectName],
        before: Mapping[ObjectName, _Slices],
        now: Mapping[ObjectName, _Slices],
    ) -> None:
        """The slices of these Services changed."""
        for name in names:
            new = _trigger_times(now.get(name, ()))
            if not new:
                continue
            for text in new - _trigger_times(before.get(name, ())):
                when = _parse(text)
                if when > self._began:
                    self._changed.append(when)

    def reconciled(self, generation: int) -> None:
        """All that has changed so far is part of this generation."""
        self._told.extend((generation, when) for when in self._changed)
        self._changed.clear()

    def acknowledged(self, generation: int) -> None:
        """Every worker has this generation."""
        if not self._told:
            return
        now = self._clock()
        while self._told and self._told[0][0] <= generation:
            self._observe(max(0.0, now - self._told.popleft()[1]))


def _trigger_times(slices: _Slices) -> set[str]:
    return {text for one in slices if (text := one.metadata.annotations.get(TRIGGER_TIME))}


def _parse(text: str) -> float:
    """Unix time; 0 if the text is not a time."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return 0.0
    return when.timestamp() if when.tzinfo is not None else 0.0
