"""The signals that are orders to the daemon. Only the main thread takes them.

During an upgrade the main thread blocks them, so that they stay pending for the next program: a thread that
took them would lose them.
"""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

DAEMON_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP})


def block_daemon_signals() -> None:
    """Block these signals in this thread, which is not the main one."""
    signal.pthread_sigmask(signal.SIG_BLOCK, DAEMON_SIGNALS)


def executor() -> ThreadPoolExecutor:
    """The executor for an event loop's `asyncio.to_thread`: its threads block these signals."""
    return ThreadPoolExecutor(thread_name_prefix="work", initializer=block_daemon_signals)
