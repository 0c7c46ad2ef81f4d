"""Signals of what tests start."""

from __future__ import annotations

import signal

# What shells and nohup(1) ignore in a background job.
_KEYS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


def give_defaults_to_children() -> None:
    """Let programs that this process executes begin with default signals, whatever it was started with.

    They inherit what is ignored, as in `make test &` in a script, but no handlers. So what is ignored here stays so, by a
    handler that does nothing.
    """
    for number in _KEYS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
