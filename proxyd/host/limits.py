"""What this process may do: descriptors, capabilities, routes."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

from proxyd.host.fib import RT_TABLE_LOCAL, local_route
from proxyd.host.netlink import RTM_DELROUTE, Netlink

# linux/capability.h: those that matter here
_CAPABILITIES = {
    "CAP_DAC_OVERRIDE": 1,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
}


def raise_nofile() -> int:
    """Raise the soft limit on open files to the hard one.

    Returns:
        The limit in force.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # an unlimited hard limit above the kernel's fs.nr_open
            return soft
    return hard


def set_oom_score(score: int) -> str:
    """Set this process's oom_score_adj, which its children inherit: -1000 never to 1000 first.

    Returns:
        "", or why it could not be set: lowering it needs CAP_SYS_RESOURCE (proc(5)).
    """
    try:
        Path("/proc/self/oom_score_adj").write_text(str(score), encoding="ascii")
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def capabilities() -> frozenset[str]:
    """Effective capabilities, as far as they matter here: CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, CAP_NET_RAW and a few more.

    They hold for the process's own user namespace. In one that does not own the network namespace (a rootless
    container with the host's network) they are worth nothing there: ask `can_route` for what really works.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    mask = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
    return frozenset(name for name, bit in _CAPABILITIES.items() if mask >> bit & 1)


def can_route() -> bool:
    """Whether routes may be changed in this network namespace.

    Asks the kernel to delete a route that cannot exist (proxyd's own for 0.0.0.0). It checks the permission first, so
    the answer is "not permitted" or "no such route", and nothing changes.
    """
    try:
        with Netlink() as netlink:
            failure = netlink.one(local_route("0.0.0.0", RT_TABLE_LOCAL, RTM_DELROUTE))
    except OSError:
        return False
    return failure is None or failure.errno not in (errno.EPERM, errno.EACCES)
