"""When the VIP guard is changed, and what is logged if it can't be."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from proxyd.control.runtime.logs import get_logger
from proxyd.host.guard import VipGuard
from proxyd.state.plan import Plan
from proxyd.state.spec import ListenerKey

log = get_logger("reconciler")


class Guarding:
    """Keeps the VIP guard in agreement with the addresses and listeners.

    Args:
        guard: None if there is to be none.
    """

    def __init__(self, guard: VipGuard | None) -> None:
        self._guard = guard
        self._made = bool(guard and guard.present())
        self._in_force: tuple[frozenset[str], frozenset[ListenerKey]] | None = None
        self._error = ""

    def begin(self, vips: AbstractSet[str], wanted: Iterable[ListenerKey]) -> None:
        """Have nft make the first guard while control makes addresses and sockets: both take equally long.

        Args:
            vips: that will be local.
            wanted: what will be listened on.
        """
        if self._guard is not None and self._in_force is None and vips:
            self._guard.begin(frozenset(vips), frozenset(key for key in wanted if key.ip in vips))
            self._made = True

    def sync(self, todo: Plan, vips: AbstractSet[str], listeners: Iterable[ListenerKey]) -> None:
        """Guard these VIPs but for these listeners, after a plan was carried out."""
        if self._guard is None:
            return
        if self._in_force is not None and not (todo.add_vips or todo.remove_vips or todo.open or todo.close):
            return  # nothing that the guard depends on has changed
        wish = frozenset(vips), frozenset(key for key in listeners if key.ip in vips)
        if self._in_force == wish or (not vips and self._in_force is None and not self._made):
            return
        error = self._guard.sync(*wish) or ""
        if error and error != self._error:
            log.warning("VIP guard failed: other ports of VIPs reach this node's own daemons", error=error)
        self._error = error
        self._in_force = wish
        self._made = True

    def forget(self) -> None:
        """Have the next `sync` compare the guard with the kernel's: somebody else may have changed it."""
        self._in_force = None

    def remove(self) -> None:
        """Remove the guard from the kernel."""
        if self._guard is not None and self._made:
            self._guard.remove()
        self._in_force = None
