"""Migration from kube-proxy: at start, the rules that it left on the node are removed or named."""

from __future__ import annotations

import asyncio

import msgspec

from proxyd.control.config.settings import Settings
from proxyd.control.runtime.logs import get_logger
from proxyd.control.runtime.tasks import spawn
from proxyd.host.kubechains import remove_userspace_chains
from proxyd.host.kubeproxy import Leftover, Mode, kube_proxy_leftovers
from proxyd.host.limits import can_route
from proxyd.host.other_proxies import Neighbour, neighbour

log = get_logger("migration")

_PAUSE = 1.0  # seconds until it is looked at again whether kube-proxy has ended


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """What was found and done.

    Attributes:
        left: what kube-proxy left, and is still there.
        removed: what was removed, a text for each table of chains.
        failed: what could not be removed, with the reason.
        running: a kube-proxy that still runs, because of which the chains stay: it holds the address of
            health or metrics. None: there is none, or nothing depended on it.
    """

    left: tuple[Leftover, ...] = ()
    removed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    running: Neighbour | None = None

    def report(self) -> None:
        """Write it to the log."""
        if self.running is not None:
            log.warning(
                "a kube-proxy still runs: the chains of its userspace mode are removed when it has ended",
                running=str(self.running),
            )
        for line in self.removed:
            log.info("removed chains of kube-proxy's userspace mode", what=line)
        for line in self.failed:
            log.error("cannot remove chains of kube-proxy's userspace mode", error=line)
        for leftover in self.left:
            log.warning(
                "kube-proxy left rules that may take traffic before it reaches proxyd",
                mode=str(leftover.mode),
                what=str(leftover),
                remove_with=leftover.removed_by,
            )


def look(settings: Settings) -> Migration:
    """Look for what kube-proxy left, and remove the chains of its userspace mode if that is wanted.

    Not for the event loop: it takes some milliseconds if nothing is found, and else calls programs. Without
    CAP_NET_ADMIN rules can neither be seen nor removed.
    """
    if not can_route():
        return Migration()
    left = kube_proxy_leftovers()
    if not (any(one.mode is Mode.USERSPACE for one in left) and wanted(settings)):
        return Migration(left=tuple(left))
    running = _kube_proxy(settings) if settings.cleanup_kube_proxy == "auto" else None
    if running is not None:
        return Migration(left=tuple(left), running=running)
    removal = remove_userspace_chains()
    return Migration(left=tuple(kube_proxy_leftovers()), removed=removal.gone, failed=removal.failed)


async def migrate(settings: Settings) -> None:
    """Look, and log what was found. If a kube-proxy still runs, a task goes on looking until it has ended."""
    found = await asyncio.to_thread(look, settings)
    found.report()
    if found.running is not None:
        spawn(_when_it_ends(settings), name="migration")


async def _when_it_ends(settings: Settings) -> None:
    """Go on looking until the kube-proxy that was found has ended, as when DaemonSets change places."""
    found = None
    while found is None or found.running is not None:
        await asyncio.sleep(_PAUSE)
        found = await asyncio.to_thread(look, settings)
    found.report()


def wanted(settings: Settings) -> bool:
    """Whether --cleanup-kube-proxy asks to remove the userspace mode's chains.

    `auto` does if proxyd takes the place of that mode in a cluster.
    """
    if settings.cleanup_kube_proxy == "auto":
        return settings.cluster and settings.proxy_mode == "userspace"
    return settings.cleanup_kube_proxy == "always"


def _kube_proxy(settings: Settings) -> Neighbour | None:
    """A kube-proxy that still runs."""
    for address in (settings.healthz_address, settings.metrics_address):
        if address is not None and (who := neighbour(address)) is not None and who.kind == "kube-proxy":
            return who
    return None
