"""What this process may do, and what to tell an operator of a right that it lacks."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NUMBERS = {"CAP_NET_BIND_SERVICE": 10, "CAP_NET_ADMIN": 12}  # linux/capability.h


def has(capability: str) -> bool:
    """Whether a capability is effective. Root need not have it, and another user may."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return os.geteuid() == 0
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return bool(match and int(match[1], 16) >> _NUMBERS[capability] & 1)


def advice(capability: str) -> str:
    """What to do if the kernel refuses what takes a capability. It never tells root to be root."""
    if has(capability):
        return f"{capability} does not help here: a user namespace or a security policy is in the way"
    if os.geteuid() == 0:
        return f"root lacks {capability} here: give it to the container or the unit"
    return f"run as root or with {capability}"
