"""How Services are planned on this node: options from the settings, and from what this process may do."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from proxyd.control.config.settings import Settings
from proxyd.host.networks import occupied
from proxyd.host.rights import advice
from proxyd.state.occupied import Occupied
from proxyd.state.snapshot import NodeAddress, Options, VipMode

_ANY_ADDRESS = ("0.0.0.0", "::", "")


class StartError(Exception):
    """The daemon can't start: one line for the user, and the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def in_use_around(settings: Settings, addresses: Collection[NodeAddress]) -> Occupied:
    """What can be no VIP on this node, where VIPs are made local by routes.

    Args:
        settings: the daemon's.
        addresses: the node's.

    Raises:
        OSError: netlink failed.
    """
    found = occupied(settings.service_cluster_ip_range, addresses)
    return msgspec.structs.replace(found, networks=()) if settings.vip_overlap == "serve" else found


def planning_options(settings: Settings, *, may_route: bool = True) -> Options:
    """How VIPs and external IPs are served; the daemon and `proxyd check` both plan with these.

    Args:
        settings: what is asked for.
        may_route: whether this process may change routes and rules. `check` plans as if it had every right.

    Raises:
        StartError: what is asked for needs a capability that this process lacks.
    """
    mode = settings.vip_mode
    if mode == "route" and not may_route:
        raise StartError(f"--vip-mode=route: {advice('CAP_NET_ADMIN')}; or use --vip-mode=loopback")
    return Options(
        vip_mode=VipMode(
            route=may_route and mode in ("auto", "route"), loopback=mode == "loopback", serve=mode != "none"
        ),
        nodeport_addresses=settings.nodeport_addresses,
        bind_addresses=() if settings.bind_address in _ANY_ADDRESS else (settings.bind_address,),
        steer_external_ips=may_route
        and mode in ("auto", "route", "none")
        and settings.external_ip_mode == "steer",
        protocols=settings.protocols,
        vip_ranges=settings.service_cluster_ip_range,
        pod_cidrs=settings.cluster_cidr,
        pods_by_node=settings.detect_local_mode == "NodeCIDR",
        localhost_nodeports=settings.iptables_localhost_nodeports,
    )
