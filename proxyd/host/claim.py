"""The claim of a network namespace's addresses: one process at most has it."""

from __future__ import annotations

import socket

# An abstract socket belongs to the network namespace, and is gone when the process that holds it ends.
CLAIM = "proxyd-addresses"


def claim_addresses() -> socket.socket | None:
    """Claim the VIP routes, policy rules and nft tables of this network namespace.

    Returns:
        The claim, which holds until it is closed; None if another process has it.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0{CLAIM}")
    except OSError:
        claim.close()
        return None
    return claim
