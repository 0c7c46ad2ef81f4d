"""What is watched, and the steps in which a watch tells of it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TypeAlias

import msgspec


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds."""

    watch_seconds: tuple[int, int] = (
        300,
        600,
    )  # how long the server should keep a watch open, at random between
    slack_seconds: float = 10.0  # a watch that is silent for longer than it should last has hung
    steady_seconds: float = 5.0  # a watch that stayed open so long is taken for a good one
    first_pause: float = 0.25
    longest_pause: float = 30.0
    page: int = 500  # objects in the first page of a list


class Resource(msgspec.Struct, frozen=True, kw_only=True):
    """What is listed and watched, in one version."""

    path: str
    kind: str
    beta: bool = False
    selectors: tuple[tuple[str, str], ...] = ()  # labelSelector, fieldSelector


class Unavailable(msgspec.Struct, frozen=True):
    """It could not be listed; 0: no answer."""

    code: int


class Listing(msgspec.Struct, frozen=True):
    """A list begins: what came of an earlier one that did not get to LISTED is void."""

    resource: Resource


class Page(msgspec.Struct, frozen=True):
    """Some objects of a list."""

    items: Sequence[msgspec.Raw]


class Marker(enum.Enum):
    """LISTED: every page has been seen; what was in none of them does not exist."""

    LISTED = enum.auto()


class Event(msgspec.Struct, frozen=True):
    """One change: ADDED, MODIFIED or DELETED."""

    type: str
    object: msgspec.Raw


class Batch(msgspec.Struct, frozen=True):
    """Changes that came in together, in order."""

    events: Sequence[Event]


Step: TypeAlias = Unavailable | Listing | Page | Marker | Batch
