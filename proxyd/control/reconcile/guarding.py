"""When the VIP guard is put in force, and what is said when it can't be."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from proxyd.control.runtime.logs import get_logger
from proxyd.host.guard import VipGuard
from proxyd.state.plan import Plan
from proxyd.state.spec import ListenerKey

log = get_logger("reconciler")


class Guarding:
    """Keeps the guard as the addresses and listeners are.

    Args:
        guard: None where there is none to be.
    """

    def __init__(self, guard: VipGuard | None) -> None:
        self._guard = guard
        self._made = bool(guard and guard.present())
        self._in_force: tuple[frozenset[str], frozenset[ListenerKey]] | None = None
        self._error = ""

    def begin(self, vips: AbstractSet[str], wanted: Iterable[ListenerKey]) -> None:
        """Have a first guard made while addresses and sockets are: nft takes as long for thousands of them.

        Args:
            vips: that will be local.
            wanted: what will be listened on.
        """
        if self._guard is not None and self._in_force is None and vips:
            self._guard.begin(frozenset(vips), frozenset(key for key in wanted if key.ip in vips))
            self._made = True

    def sync(self, todo: Plan, vips: AbstractSet[str], listeners: Iterable[ListenerKey]) -> None:
        """Guard these VIPs, all but these listeners, after a plan was carried out."""
        if self._guard is None:
            return
        if self._in_force is not None and not (todo.add_vips or todo.remove_vips or todo.open or todo.close):
            return  # nothing that it is made of has changed
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
        """Somebody else may have changed it: the next `sync` looks."""
        self._in_force = None

    def remove(self) -> None:
        """Take it back."""
        if self._guard is not None and self._made:
            self._guard.remove()
        self._in_force = None
