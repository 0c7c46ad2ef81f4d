"""Makes addresses the node's own: VIP routes, policy rules, and the guard of the VIPs' other ports."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import partial

from proxyd.api.problems import Problem, Severity
from proxyd.control.reconcile.parking import Parking
from proxyd.control.runtime.logs import get_logger, log_some
from proxyd.host.addresses import node_addresses
from proxyd.host.guard import TABLE as GUARD_TABLE
from proxyd.host.guard import VipGuard
from proxyd.host.networks import Links, links
from proxyd.host.nft import table_exists
from proxyd.host.routes import VipRoutes
from proxyd.host.steering import Steering as SteeringRules
from proxyd.host.udp_source import TABLE as UDP_TABLE
from proxyd.state.plan import Plan
from proxyd.state.spec import ListenerKey, Steering

log = get_logger("reconciler")


class Addresses:
    """The addresses that proxyd has made local or steers. Those that a killed daemon left are taken over.

    Args:
        routes: None if VIPs are not to be routed.
        rules: None if nothing is to be steered.
        guard: None if there is to be none.
        parking: None if listeners are bound.

    Attributes:
        vips: VIPs that are local by a route.
        vip_errors: for other VIPs, why they are not local.
        steering: what is steered.
    """

    def __init__(
        self,
        routes: VipRoutes | None,
        rules: SteeringRules | None,
        guard: VipGuard | None,
        parking: Parking | None = None,
    ) -> None:
        self.vips: set[str] = set(routes.present()) if routes else set()
        self.vip_errors: dict[str, str] = {}
        self.steering: dict[ListenerKey, Steering] = rules.present() if rules else {}
        self._routes = routes
        self._rules = rules
        self._parking = parking
        self._guard = _Guard(guard)
        self._refused: frozenset[ListenerKey] | None = None
        self._rules_trouble = ""

    @property
    def guarded(self) -> set[str]:
        """The VIPs, and the addresses that are steered: what nobody listens on is refused there."""
        return self.vips | {key.ip for key in self.steering}

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What does not work as it should."""
        trouble = self._rules_trouble
        return (Problem(severity=Severity.WARNING, message=trouble),) if trouble else ()

    def add(self, todo: Plan, wanted: Collection[ListenerKey]) -> None:
        """Make VIPs local. Call it before listeners are opened.

        Args:
            todo: the plan.
            wanted: what will be listened on.
        """
        if todo.add_vips or todo.steer or todo.unsteer:
            self._guard_parked(todo.add_vips.union(key.ip for key in todo.steer))
        if todo.add_vips:
            self._guard.begin(todo.add_vips | self.vips, wanted)
        self._add_vips(todo)

    def settle(self, todo: Plan, listeners: Collection[ListenerKey], held: AbstractSet[ListenerKey]) -> None:
        """Steer to the open listeners, and remove what nobody needs. Call it when listeners have changed.

        Args:
            todo: the plan.
            listeners: those that are open.
            held: the addresses that relays of closed listeners need.
        """
        self._steer(todo, listeners, held)
        self._remove(todo, held)
        if todo.remove_vips or todo.unsteer:
            self._guard_parked()
        if self._parking is not None:
            self._parking.settle(held)
        self._guard.sync(todo, self.vips, listeners)

    def observe(self, suspects: AbstractSet[str] = frozenset()) -> dict[str, str]:
        """Find out what somebody has removed. The next plan has those VIPs, and the next `settle` the rest.

        Args:
            suspects: names of nft tables that somebody has changed, and that are made anew.

        Returns:
            What is gone, in words, by kind: "routes", "rules", or the name of a table.
        """
        lost: dict[str, str] = {}
        try:
            if self._routes:
                # A VIP that is one of the node's ordinary addresses has no route, and needs none.
                own = {address.ip for address in node_addresses()}
                there = set(self._routes.present()) | (self.vips & own)
                if gone := len(self.vips - there):
                    lost["routes"] = f"{gone} VIP route{'s' if gone > 1 else ''}"
                self.vips = there
            if self._rules and (text := self._rules.lost()):
                lost["rules"] = text
            for table, is_there, forget in self._tables():
                if table in suspects or not is_there():
                    lost[table] = f"nft table {table}"
                    forget()
        except OSError as error:
            log.warning("routes, rules and nft tables can't be read", error=str(error))
        self.changed()
        return lost

    def _tables(self) -> Iterator[tuple[str, Callable[[], bool], Callable[[], None]]]:
        """The nft tables that there should be, whether each is there, and how it is made anew."""
        if self._guard.made:
            yield GUARD_TABLE, self._guard.present, self._guard.forget
        if self._parking is not None and self._parking.has_table:
            yield UDP_TABLE, partial(table_exists, UDP_TABLE), self._parking.forget
        if self._rules is not None:
            for table in self._rules.tables:
                yield table, partial(table_exists, table), self._rules.forget

    def changed(self, gone: AbstractSet[str] = frozenset()) -> dict[str, str]:
        """Look after what depends on the node's addresses. Call it when these have changed.

        Args:
            gone: addresses that the node has no more. VIPs among them have had no route.

        Returns:
            What went with them, as `observe`.
        """
        self._refused = None  # the next `settle` looks after what is steered
        self._guard.look_at_links()
        without = self.vips & gone
        self.vips -= without
        many = "s" if len(without) > 1 else ""
        return {"routes": f"{len(without)} VIP{many} that another interface had"} if without else {}

    def remove_all(self) -> None:
        """Remove every route and rule, and the guard."""
        if self._rules:
            _report("foreign address can't be given back", self._rules.sync({}))
        if self._routes and self.vips:
            _report("VIP route can't be removed", self._routes.remove(self.vips))
        self._guard.remove()
        if self._parking is not None:
            self._parking.remove()
        self.steering.clear()
        self.vips.clear()

    def _add_vips(self, todo: Plan) -> None:
        if self._routes and todo.add_vips:
            failed = self._routes.add(todo.add_vips)
            _report(
                "VIP route can't be added", {ip: e for ip, e in failed.items() if ip not in self.vip_errors}
            )
            self.vip_errors = failed
            self.vips |= todo.add_vips.difference(failed)

    def _steer(self, todo: Plan, listeners: Container[ListenerKey], held: AbstractSet[ListenerKey]) -> None:
        """Steer as the plan says."""
        if self._rules is None:
            return
        # A key is LOCAL only while somebody listens: otherwise the traffic would hang. One whose relays drain
        # stays LOCAL, because they need it.
        wanted = self.steering | {
            key: how if key in listeners else Steering.UNREACHABLE
            for key, how in todo.steer.items()
            if how is Steering.LOCAL or key not in held
        }
        for key in todo.unsteer:
            if key not in held:
                wanted.pop(key, None)
        # Clients of an address whose listener is closed while its relays live on would hang.
        refused = frozenset(key for key in held if key in wanted and key not in listeners)
        if wanted == self.steering and refused == self._refused:
            return
        failed = self._rules.sync(wanted, refused)
        _report("foreign address can't be steered", failed)
        self.steering = {key: how for key, how in wanted.items() if key not in failed}
        self._refused = refused
        if self._rules.trouble and self._rules.trouble != self._rules_trouble:
            log.warning(self._rules.trouble)
        self._rules_trouble = self._rules.trouble

    def _remove(self, todo: Plan, held: AbstractSet[ListenerKey]) -> None:
        """Take away the VIPs that nobody needs."""
        if self._routes and (free := todo.remove_vips.difference(key.ip for key in held)):
            _report("VIP route can't be removed", self._routes.remove(free))
            self.vips -= free

    def _guard_parked(self, more: AbstractSet[str] = frozenset()) -> None:
        if self._parking is not None:
            self._parking.guard(self.guarded | more)


class _Guard:
    """Keeps the VIP guard in agreement with the addresses and listeners.

    Args:
        guard: None if there is to be none.

    Attributes:
        made: whether the table is there, as far as is known.
    """

    def __init__(self, guard: VipGuard | None) -> None:
        self._guard = guard
        self.made = bool(guard and table_exists(GUARD_TABLE))
        self._in_force: tuple[frozenset[str], frozenset[ListenerKey]] | None = None
        self._error = ""
        self._no_arp = ""
        self._links: Links | None = None
        self.look_at_links()

    def present(self) -> bool:
        """Whether the kernel has the guard, whichever process made it."""
        return self._guard is not None and self._guard.present()

    def look_at_links(self) -> None:
        """Have the next `sync` go by the links that there are now."""
        if self._guard is None:
            return
        try:
            found = links()
        except OSError as error:
            log.warning("the node's links can't be read", error=str(error))
            return
        if found != self._links:
            self._links, self._in_force = found, None
            self._guard.set_links(found)

    def begin(self, vips: AbstractSet[str], wanted: Iterable[ListenerKey]) -> None:
        """Have nft make the first guard while control makes addresses and sockets: both take equally long.

        Args:
            vips: that will be local.
            wanted: what will be listened on.
        """
        if self._guard is not None and self._in_force is None and vips:
            self._guard.begin(frozenset(vips), frozenset(key for key in wanted if key.ip in vips))
            self.made = True

    def sync(self, todo: Plan, vips: AbstractSet[str], listeners: Iterable[ListenerKey]) -> None:
        """Guard these VIPs but for these listeners, after a plan was carried out."""
        if self._guard is None:
            return
        if self._in_force is not None and not (todo.add_vips or todo.remove_vips or todo.open or todo.close):
            return  # nothing that the guard depends on has changed
        wish = frozenset(vips), frozenset(key for key in listeners if key.ip in vips)
        if self._in_force == wish or (not vips and self._in_force is None and not self.made):
            return
        error = self._guard.sync(*wish) or ""
        if error and error != self._error:
            log.warning("VIP guard failed: other ports of VIPs reach this node's own daemons", error=error)
        if self._guard.no_arp and self._guard.no_arp != self._no_arp:
            log.info("neighbours see this node answer for VIPs by ARP", reason=self._guard.no_arp)
        self._error, self._no_arp = error, self._guard.no_arp
        self._in_force = wish
        self.made = not error

    def forget(self) -> None:
        """Have the next `sync` make the guard anew: somebody else has changed it."""
        self._in_force = None
        if self._guard is not None:
            self._guard.forget()

    def remove(self) -> None:
        """Remove the guard from the kernel."""
        if self._guard is not None and (self.made or self._in_force is not None):
            self._guard.remove()
        self._in_force, self.made = None, False


def _report(what: str, errors: Mapping[ListenerKey, str] | Mapping[str, str]) -> None:
    """Log the first three of many errors of one kind, and how many more there are."""
    log_some(
        log.warning, what, [{"address": str(subject), "error": error} for subject, error in errors.items()], 3
    )
