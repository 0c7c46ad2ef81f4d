"""Who may change addresses: one process at most in a network namespace."""

from __future__ import annotations

import socket

# An abstract name: it belongs to the network namespace, and goes with the process that holds it.
CLAIM = "proxyd-addresses"


def claim_addresses() -> socket.socket | None:
    """Claim the VIP routes, policy rules and nft tables of this network namespace.

    Returns:
        The claim, to be held open for as long as it is needed; None where another process has it.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0{CLAIM}")
    except OSError:
        claim.close()
        return None
    return claim
