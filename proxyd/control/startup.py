"""What the daemon makes once, at its start: the claim of the node's addresses, the reconciler."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

from proxyd.control.config.options import StartError
from proxyd.control.config.settings import Settings
from proxyd.control.feeds.joined import FeedError, Feeds
from proxyd.control.reconcile.reconciler import Reconciler
from proxyd.control.runtime.logs import get_logger
from proxyd.control.workers.publication import Publication
from proxyd.host import limits
from proxyd.host.claim import claim_addresses
from proxyd.host.guard import VipGuard
from proxyd.host.routes import VipRoutes
from proxyd.host.steering import Steering as SteeringRules
from proxyd.state.snapshot import Options, Snapshot
from proxyd.state.spec import SctpOptions, ServicePortName

log = get_logger("proxyd")


def set_oom_score(settings: Settings) -> None:
    """Make it less or more likely that the kernel ends this process and its workers for lack of memory; best effort."""
    score = settings.oom_score
    if score is not None and (reason := limits.set_oom_score(score)):
        # What nobody asked for need not be mended.
        say = log.debug if settings.oom_score_adj is None else log.warning
        say("oom_score_adj stays as it was", wanted=score, reason=reason)


def claim(options: Options) -> contextlib.AbstractContextManager[object]:
    """The node's routes and rules for this daemon, until the context ends: one at most has them in a namespace.

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


def make_reconciler(
    settings: Settings,
    options: Options,
    publication: Publication,
    note: Callable[[ServicePortName, str], None],
) -> Reconciler:
    """A reconciler with the means that the options call for.

    Args:
        settings: for the drain.
        options: what is to be done to the node.
        publication: what it tells the workers through.
        note: takes note of what happened to a service port.
    """
    guard = None
    if options.vip_mode.route:
        guard = VipGuard()
        if reason := guard.available():
            log.warning("no VIP guard: other ports of VIPs reach this node's own daemons", reason=reason)
            guard = None
    return Reconciler(
        publication,
        routes=VipRoutes() if options.vip_mode.route else None,
        rules=SteeringRules() if options.steer_external_ips else None,
        guard=guard,
        drain_seconds=settings.drain_timeout,
        note=note,
        sctp=SctpOptions(settings.sctp_max_message, settings.sctp_max_streams),
    )


def make_feeds(
    settings: Settings, changed: Callable[[Snapshot], None], node_changed: Callable[[], None]
) -> Feeds:
    """All sources that the settings name; see `Feeds`.

    Raises:
        StartError: a source can't be used.
    """
    try:
        return Feeds(settings, changed, node_changed)
    except FeedError as error:
        raise StartError(str(error), 3) from None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """In this block, which keeps the event loop waiting, a signal to end ends the program at once.

    Raises:
        SystemExit: SIGTERM came.
        KeyboardInterrupt: SIGINT came.
    """
    came: list[int] = []

    def ended() -> BaseException:
        return KeyboardInterrupt() if signal.SIGINT in came else SystemExit(0)

    def end(number: int, _frame: object) -> None:
        came.append(number)
        raise ended()

    def ignored(given: sys.UnraisableHookArgs) -> None:
        # Where nothing can be raised, as in a callback of the interpreter, it is raised after the block.
        if not (came and isinstance(given.exc_value, KeyboardInterrupt | SystemExit)):
            hook(given)

    hook, sys.unraisablehook = sys.unraisablehook, ignored
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
    if came:
        raise ended()


def read_first(feed: Feeds, idle: Callable[[], None]) -> None:
    """Read the manifests once, and hand them on where there is nobody else to wait for.

    Args:
        feed: that reads them.
        idle: what to do where there is nothing to do but to wait for another process.

    Raises:
        StartError: a path that was named can't be read.
    """
    problems = feed.first(idle)
    if feed.missing:
        path = feed.missing[0]
        why = next((problem.message for problem in problems if problem.file == path), "cannot be read")
        raise StartError(f"{path}: {why} (--manifests)", 3)
