"""Python's garbage collector: when it may run, and how often."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No garbage collection in this block, which makes many objects that are all dropped soon after."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def collect_rarely() -> None:
    """Collect rarely from now on, and the oldest generation hardly ever.

    Ten thousand Services are half a million objects without reference cycles: each full collection took 0.2
    s, in which no change was put in force, and found nothing. The daemon runs one with each
    --config-sync-period.
    """
    gc.set_threshold(50_000, 20, 100)


@contextlib.contextmanager
def permanent_objects() -> Iterator[None]:
    """No garbage collection in this block, and none later of what it makes: these objects stay (`gc.freeze`).

    For the first load and the first reconcile, half of whose time would go into collections.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if collecting:
            gc.enable()
