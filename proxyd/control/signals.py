"""What signals mean to the daemon."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

from proxyd.control.reloading import has_terminal

if TYPE_CHECKING:
    from proxyd.control.daemon import Daemon


def handle_signals(daemon: Daemon) -> None:
    """Have them handled in the event loop, from the beginning on: until a handler is there a signal ends the process."""
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
