"""Durations and ranges as Go programs write them: `250ms`, `1m30s`, `30000-32767`."""

from __future__ import annotations

import re

from proxyd.api.durations import parse_duration

__all__ = ["format_duration", "parse_duration", "parse_port_range"]


def format_duration(seconds: float) -> str:
    """A duration as a person would say it, in at most two units: `3d4h`, `1m30s`, `25s`, `250ms`."""
    if 0 < seconds < 1:
        return f"{max(1, round(seconds * 1000))}ms"
    left = int(seconds)
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count}{unit}")
        elif parts:
            break
    return "".join(parts[:2]) or "0s"


def parse_port_range(text: str) -> tuple[int, int]:
    """First and last port of `a-b` (both included), `a+n` (a and n more) or `a`.

    The forms are those of kubernetes apimachinery/pkg/util/net/port_range.go.

    Raises:
        ValueError: it is none of these, or leaves 1 to 65535, or ends before it begins.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*(?:([-+])\s*(\d{1,6})\s*)?", text)
    if match is None:
        raise ValueError(f'expected a port range such as 30000-32767, 30000+2767 or 30000, got "{text}"')
    first = last = int(match[1])
    if match[3] is not None:
        last = int(match[3]) + (first if match[2] == "+" else 0)
    if not (1 <= first <= 65535 and 1 <= last <= 65535):
        raise ValueError(f'ports go from 1 to 65535, got "{text}"')
    if last < first:
        raise ValueError(f'the range ends before it begins: "{text}"')
    return first, last
