"""What signals mean to the daemon."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable

from proxyd.control.lifecycle import Lifecycle
from proxyd.control.runtime.signal_mask import DAEMON_SIGNALS, executor

# So long the event loop has for what came before signals are held: it sees them in its next turn.
_SEEN_SECONDS = 0.01


def handle_signals(
    lifecycle: Lifecycle,
    *,
    drain_timeout: Callable[[], float],
    reload: Callable[[], None],
    upgrade: Callable[[], None],
) -> None:
    """Handle them in the event loop from now on; without a handler a signal ends the process.

    What came while the program was being replaced comes now.

    Args:
        lifecycle: is told to stop.
        drain_timeout: the seconds that relays have after SIGTERM.
        reload: orders that the configuration and the manifests are read again.
        upgrade: orders that the installed program takes over.
    """
    loop = asyncio.get_running_loop()

    def hung_up() -> None:
        """Stop where the terminal is gone that this was started from; else it is an order to reload."""
        if has_terminal():
            reload()
        else:
            lifecycle.stop_after(0.0)

    loop.add_signal_handler(signal.SIGTERM, lambda: lifecycle.stop_after(drain_timeout()))
    loop.add_signal_handler(signal.SIGINT, lifecycle.stop_after, 0.0)
    loop.add_signal_handler(signal.SIGUSR2, upgrade)
    loop.add_signal_handler(signal.SIGHUP, hung_up if has_terminal() else reload)
    loop.set_default_executor(executor())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, DAEMON_SIGNALS)


async def hold_signals() -> None:
    """Handle what has come; what comes from now on waits for the next program, or for `handle_signals`.

    Blocked signals stay pending across execve(2). No child may be started until then: it would never get
    them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, DAEMON_SIGNALS)
    await asyncio.sleep(_SEEN_SECONDS)
    # A thread of a library may not leave signals to the main one: what it gets is sent to the thread that
    # lives on.
    main = threading.main_thread().ident
    assert main is not None
    for number in DAEMON_SIGNALS:
        signal.signal(number, lambda came, _frame: signal.pthread_kill(main, came))


def has_terminal() -> bool:
    """Whether this process has a terminal that lives."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
