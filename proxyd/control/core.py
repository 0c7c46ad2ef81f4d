"""What the parts of the control process share: settings, objects, and the parts that carry them out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from proxyd.control.config.settings import Settings
from proxyd.control.feeds.joined import JoinedFeed
from proxyd.control.lifecycle import Lifecycle
from proxyd.control.reconcile.reconciler import Reconciler
from proxyd.control.runtime.accesslog import AccessLog
from proxyd.control.workers.old_workers import DrainingWorkers
from proxyd.control.workers.publication import Publication
from proxyd.control.workers.supervisor import Supervisor
from proxyd.state.snapshot import NodeView, Options, Snapshot


class VipListen(NamedTuple):
    """How listeners of VIPs are opened."""

    how: str = ""  # "parked" or "bound"; "" where proxyd makes no VIPs
    why: str = ""  # of "bound": one line


@dataclass(slots=True, kw_only=True)
class Core:
    """The parts of one daemon, without methods. The daemon fills it before it starts anything that reads it.

    Attributes:
        settings: those in force. The daemon replaces them when the configuration is read again.
        options: how Services are planned; they follow from the settings.
        lifecycle: the phase, and the order to end.
        publication: what the workers know.
        reconciler: what is open, and what failed.
        supervisor: the worker processes.
        old_workers: the workers of the programs before this one.
        access: the access log.
        vip_listen: how listeners of VIPs are opened.
        feed: the sources. It is set while the workers start.
        node: this node, as known from the sources and its addresses.
        snapshot: the newest objects of the sources.
        turns: how many reconciles there were.
        started: Unix time.
    """

    settings: Settings
    options: Options
    lifecycle: Lifecycle
    publication: Publication
    reconciler: Reconciler
    supervisor: Supervisor
    old_workers: DrainingWorkers
    access: AccessLog
    feed: JoinedFeed = field(init=False)
    node: NodeView
    vip_listen: VipListen = field(default_factory=VipListen)
    snapshot: Snapshot = field(default_factory=Snapshot)
    turns: int = 0
    started: float = field(default_factory=time.time)
