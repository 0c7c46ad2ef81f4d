"""What this process may do: open descriptors, change routes, and live when memory is short."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

from proxyd.host.fib import RT_TABLE_LOCAL, local_route
from proxyd.host.netlink import RTM_DELROUTE, Netlink


def raise_nofile() -> int:
    """Raise the soft limit on open files to the hard one.

    Returns:
        The limit that is in force now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # the hard limit is unlimited, and fs.nr_open is not
            return soft
    return hard


def set_oom_score(score: int) -> str:
    """Set oom_score_adj of this process and of its later children: from -1000 (never killed) to 1000 (first).

    Returns:
        "", or why it could not be set. Lowering it needs CAP_SYS_RESOURCE (proc(5)).
    """
    try:
        Path("/proc/self/oom_score_adj").write_text(str(score), encoding="ascii")
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def can_route() -> bool:
    """Whether this process may change routes in its network namespace.

    The kernel is asked to delete a route that cannot exist, proxyd's own for 0.0.0.0. It checks the
    permission first, so the answer is "not permitted" or "no such route", and nothing changes.
    """
    try:
        with Netlink() as netlink:
            failure = netlink.one(local_route("0.0.0.0", RT_TABLE_LOCAL, RTM_DELROUTE))
    except OSError:
        return False
    return failure is None or failure.errno not in (errno.EPERM, errno.EACCES)
