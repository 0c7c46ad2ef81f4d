"""What signals mean to the daemon."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import TYPE_CHECKING

from proxyd.control.config.reload import has_terminal
from proxyd.control.runtime.signal_mask import ORDERS, executor

if TYPE_CHECKING:
    from proxyd.control.daemon import Daemon


# So long the event loop has for what came before signals are held: it sees them in its next turn.
_SEEN_SECONDS = 0.01


def handle_signals(daemon: Daemon) -> None:
    """Have them handled in the event loop, from the beginning on: until a handler is there a signal ends the process.

    What came while the program was being replaced comes now.
    """
    loop = asyncio.get_running_loop()

    def hung_up() -> None:
        """A hang-up: of the terminal that it was started from, or else an order to reload."""
        if has_terminal():
            daemon.reloading.ask()
        else:
            daemon.stop_after(0.0)

    loop.add_signal_handler(signal.SIGTERM, lambda: daemon.stop_after(daemon.settings.drain_timeout))
    loop.add_signal_handler(signal.SIGINT, daemon.stop_after, 0.0)
    loop.add_signal_handler(signal.SIGUSR2, daemon.succession.ask)
    loop.add_signal_handler(signal.SIGHUP, hung_up if has_terminal() else daemon.reloading.ask)
    loop.set_default_executor(executor())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ORDERS)


async def hold_signals() -> None:
    """Handle what has come; what comes from now on waits for the next program, or for `handle_signals`.

    Blocked signals stay pending across execve(2). No child may be started until then: it would never get them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ORDERS)
    await asyncio.sleep(_SEEN_SECONDS)
    # What a library's thread gets, which does not leave it to the main one (`orders`), is for the one that lives on.
    main = threading.main_thread().ident
    assert main is not None
    for number in ORDERS:
        signal.signal(number, lambda came, _frame: signal.pthread_kill(main, came))
