"""The one error of this package, and whether a machine is needed at all."""

from __future__ import annotations

import socket


class VmError(Exception):
    """The machine cannot be used. The text is one line: what is wrong, and what to do."""


def has_sctp() -> bool:
    """Whether the running kernel has SCTP."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError:
        return False
    return True
