"""What the daemon makes and does once, when it starts."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from proxyd.control.config.options import StartError, planning_options
from proxyd.control.config.settings import Settings
from proxyd.control.core import Core, VipListen
from proxyd.control.feeds.joined import FeedError, JoinedFeed
from proxyd.control.lifecycle import Lifecycle
from proxyd.control.observe import systemd
from proxyd.control.observe.systemd import Notifier
from proxyd.control.reconcile.parking import Parking
from proxyd.control.reconcile.reconciler import Reconciler
from proxyd.control.runtime.accesslog import AccessLog
from proxyd.control.runtime.garbage import collect_rarely
from proxyd.control.runtime.logs import Summariser, get_logger
from proxyd.control.workers.handover import Handover
from proxyd.control.workers.old_workers import DrainingWorkers
from proxyd.control.workers.publication import Publication
from proxyd.control.workers.supervisor import Supervisor
from proxyd.host import limits, parked
from proxyd.host.claim import claim_addresses
from proxyd.host.guard import VipGuard
from proxyd.host.routes import VipRoutes
from proxyd.host.steering import Steering as SteeringRules
from proxyd.host.udp_source import UdpSourcePorts
from proxyd.relay.ipc.options import Options as WorkerOptions
from proxyd.relay.ipc.slots import Slots
from proxyd.state.snapshot import NodeView, Options, Snapshot
from proxyd.state.spec import SctpOptions, ServicePortName

log = get_logger("proxyd")


def prepare_process(settings: Settings) -> None:
    """Set limits of this process and its workers, and how rarely garbage is collected; best effort."""
    collect_rarely()
    limits.raise_nofile()
    score = settings.oom_score
    if score is not None and (reason := limits.set_oom_score(score)):
        # A warning only if the operator asked for a score.
        say = log.debug if settings.oom_score_adj is None else log.warning
        say("oom_score_adj stays as it was", wanted=score, reason=reason)


def claim(options: Options) -> contextlib.AbstractContextManager[object]:
    """Claim the node's routes and rules until the context ends. In a namespace one daemon at most has them.

    Raises:
        StartError: another daemon has them.
    """
    if not (options.vip_mode.route or options.steer_external_ips):
        return contextlib.nullcontext()
    held = claim_addresses()
    if held is None:
        raise StartError(
            "another proxyd manages VIPs on this node: stop it first, or use --vip-mode=bind for this one"
        )
    return held


def make_core(
    settings: Settings,
    lifecycle: Lifecycle,
    left: Handover,
    resources: contextlib.ExitStack,
    *,
    summariser: Summariser,
    note: Callable[[ServicePortName, str], None],
    look_again: Callable[[], None],
    notifier: Notifier,
) -> Core:
    """Make the parts that the others share. Nothing is started, and nothing is done to the node.

    Args:
        settings: what to do.
        lifecycle: of the daemon.
        left: what the program before this one handed over.
        resources: closes what is to be closed at the end.
        summariser: logs what happens often.
        note: takes note of what happened to a service port.
        look_again: orders a reconcile, because an address may be free.
        notifier: has the service manager keep what is to outlive this process.

    Raises:
        StartError: the settings ask for what can't be had here.
    """
    options = planning_options(settings, may_route=limits.can_route())
    resources.enter_context(claim(options))
    slots = Slots.create()
    resources.callback(slots.close)
    access = AccessLog(settings.access_log)
    resources.callback(access.close)
    publication = Publication(slots, settings.workers)
    supervisor = Supervisor(
        settings.workers,
        slots,
        publication,
        WorkerOptions.of(settings, records=bool(settings.access_log)),
        summariser=summariser,
    )
    parking, vip_listen = make_parking(settings, options, left, notifier)
    if parking is not None:
        resources.callback(parking.close_descriptors)
    old_workers = DrainingWorkers(
        left.workers, supervisor.heard, look_again, supervisor.live_query.worker_gone
    )
    supervisor.live_query.add_workers(old_workers.tell)
    return Core(
        settings=settings,
        options=options,
        lifecycle=lifecycle,
        publication=publication,
        reconciler=_make_reconciler(settings, options, publication, note, parking),
        supervisor=supervisor,
        old_workers=old_workers,
        access=access,
        vip_listen=vip_listen,
        node=NodeView(name=settings.node_name),
    )


def _make_reconciler(
    settings: Settings,
    options: Options,
    publication: Publication,
    note: Callable[[ServicePortName, str], None],
    parking: Parking | None,
) -> Reconciler:
    """A reconciler that changes what the options allow it to."""
    guard = None
    if options.vip_mode.route:
        # What outlives this process guards TCP and UDP alone; else the table does, which does.
        guard = VipGuard(others_only=parking is not None and parking.kept)
        if reason := guard.available():
            log.warning("no VIP guard: other ports of VIPs reach this node's own daemons", reason=reason)
            guard.remove()  # a killed daemon's, which would refuse what is served now
            guard = None
    return Reconciler(
        publication,
        routes=VipRoutes() if options.vip_mode.route else None,
        rules=SteeringRules(settings.fwmark) if options.steer_external_ips else None,
        guard=guard,
        drain_seconds=settings.drain_timeout,
        note=note,
        sctp=SctpOptions(settings.sctp_max_message, settings.sctp_max_streams),
        parking=parking,
    )


def make_parking(
    settings: Settings, options: Options, left: Handover, notifier: Notifier
) -> tuple[Parking | None, VipListen]:
    """What parks listeners of VIPs, None if they are bound; and what is told of that.

    Args:
        settings: whether they are to be parked.
        options: whether proxyd makes VIPs local.
        left: what the program before this one handed over.
        notifier: has the service manager keep what is to outlive this process.

    Raises:
        StartError: they are to be parked, and can't be.
    """
    stored = {name: given[0] for name, given in systemd.stored().items() if name in parked.NAMES}
    earlier = left.vip_lookup or stored
    must = settings.vip_listen == "parked"
    if not options.vip_mode.route or settings.vip_listen == "bound":
        parked.discard(earlier)
        for name in stored:
            notifier.forget(name)
        if must:
            raise StartError("--vip-listen=parked needs --vip-mode=route: else proxyd makes no VIPs")
        return None, VipListen("bound", "--vip-listen=bound") if options.vip_mode.route else VipListen()
    try:
        listeners = parked.ParkedListeners(earlier)
    except OSError as error:
        reason = parked.why_not(error)
        if must:
            raise StartError(f"--vip-listen=parked: {reason}") from None
        log.warning("VIPs are bound: a daemon that listens at all addresses takes their ports", reason=reason)
        return None, VipListen("bound", reason)
    pinned = not listeners.pin()
    kept = not pinned and all(notifier.store(name, fd) for name, fd in listeners.descriptors.items())
    udp = UdpSourcePorts()
    if reason := udp.unavailable():
        log.warning("UDP Services are bound at their VIPs, and TCP ones parked", reason=reason)
    return (
        Parking(listeners, None if reason else udp, kept=pinned or kept, forget=notifier.forget),
        VipListen("parked"),
    )


def make_feed(
    settings: Settings, changed: Callable[[Snapshot], None], node_changed: Callable[[], None]
) -> JoinedFeed:
    """The sources that the settings name; see `JoinedFeed`.

    Raises:
        StartError: a source can't be used.
    """
    try:
        return JoinedFeed(settings, changed, node_changed)
    except FeedError as error:
        raise StartError(str(error), 3) from None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """In this block, which blocks the event loop, SIGTERM and SIGINT end the program at once.

    Raises:
        SystemExit: SIGTERM came.
        KeyboardInterrupt: SIGINT came.
    """

    def end(number: int, _frame: object) -> None:
        raise (KeyboardInterrupt if number == signal.SIGINT else SystemExit(0))

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_first(feed: JoinedFeed) -> None:
    """Read the manifests once, and hand them on unless there is a cluster to wait for.

    Args:
        feed: reads them.

    Raises:
        StartError: a path that was named can't be read.
    """
    problems = feed.first()
    if feed.missing:
        path = feed.missing[0]
        why = next((problem.message for problem in problems if problem.file == path), "cannot be read")
        raise StartError(f"{path}: {why} (--manifests)", 3)
