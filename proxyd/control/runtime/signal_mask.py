"""The signals that are orders to the daemon. All threads but the main one leave them to it: it can hold them for the next program."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

ORDERS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP})


def leave_to_main() -> None:
    """Take no orders in this thread, which is not the main one."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ORDERS)


def executor() -> ThreadPoolExecutor:
    """For an event loop's `asyncio.to_thread`: with threads that take no orders."""
    return ThreadPoolExecutor(thread_name_prefix="work", initializer=leave_to_main)
