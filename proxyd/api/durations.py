"""Durations as Go programs write them: `250ms`, `1m30s`."""

from __future__ import annotations

import math
import re

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_MAX_SECONDS = 10 * 365 * 86400.0


def parse_duration(text: str) -> float:
    """Seconds of a Go duration (`250ms`, `1m30s`) or of a plain number of seconds (`25`, `0.5`).

    Raises:
        ValueError: it is neither, or negative, or over ten years; the text says which.
    """
    given = text.strip()
    try:
        seconds = float(given)
    except ValueError:
        parts = _PART.findall(given)
        if not parts or "".join(number + unit for number, unit in parts) != given.lstrip("+"):
            raise ValueError(f'expected a duration such as 25s, 1m30s or 250ms, got "{text}"') from None
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not math.isfinite(seconds) or not 0 <= seconds <= _MAX_SECONDS:
        raise ValueError(f'expected a duration from 0 to ten years, got "{text}"')
    return seconds
