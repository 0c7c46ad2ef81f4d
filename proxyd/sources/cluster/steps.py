"""What can be followed, and the steps in which a watcher reports it."""

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
    slack_seconds: float = 10.0  # a watch that is silent for so long after its end is taken for hung
    steady_seconds: float = 5.0  # after so long a watch counts as working
    first_pause: float = 0.25
    longest_pause: float = 30.0
    page: int = 500  # objects in the first page of a list


class Resource(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of objects in one version of the API, as it is listed and watched."""

    path: str
    kind: str
    beta: bool = False
    selectors: tuple[tuple[str, str], ...] = ()  # labelSelector, fieldSelector


class Unavailable(msgspec.Struct, frozen=True):
    """The objects could not be listed; `code` is the HTTP status, 0: no answer."""

    code: int


class Listing(msgspec.Struct, frozen=True):
    """A list begins. The pages of an earlier one that did not reach LISTED are void."""

    resource: Resource


class Page(msgspec.Struct, frozen=True):
    """Some of the objects of a list."""

    items: Sequence[msgspec.Raw]


class Marker(enum.Enum):
    """LISTED: all pages have come; an object that was in none of them does not exist."""

    LISTED = enum.auto()


class Event(msgspec.Struct, frozen=True):
    """One change: ADDED, MODIFIED or DELETED."""

    type: str
    object: msgspec.Raw


class Batch(msgspec.Struct, frozen=True):
    """Changes that arrived together, in order."""

    events: Sequence[Event]


Step: TypeAlias = Unavailable | Listing | Page | Marker | Batch
