"""Python's search for garbage, and when to leave it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No search for garbage in this block: it makes many objects that all go soon after."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def seldom() -> None:
    """Search seldom from now on, and hardly ever through everything: the daemon does that with each --config-sync-period.

    Ten thousand Services are half a million objects, and what is made of them refers to itself nowhere: each search of
    all of them took 0.2 s in which nothing was put in force, and found nothing.
    """
    gc.set_threshold(50_000, 20, 100)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """What is made in this block stays: it is not looked through for garbage, neither as it grows nor later.

    For what is read and opened first: searching it again and again is up to half of the time that it takes.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if collecting:
            gc.enable()
