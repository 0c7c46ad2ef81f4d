"""The input of planning: every object known at one moment, the node, and the operator's settings."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from proxyd.api.discovery import EndpointSlice
from proxyd.api.meta import ObjectName
from proxyd.api.service import Service
from proxyd.state.occupied import Occupied


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Services and the slices of each. Endpoints objects and Pods have been turned into slices before."""

    services: Mapping[ObjectName, Service] = {}
    slices: Mapping[ObjectName, tuple[EndpointSlice, ...]] = {}  # by Service


class NodeAddress(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """One address of this node."""

    ip: str
    interface: str = ""
    primary: bool = False  # an address of an interface with a default route, the first of its family


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """The node as planning sees it. `addresses` are without the VIPs that proxyd itself made local."""

    name: str = ""
    zone: str = ""
    addresses: tuple[NodeAddress, ...] = ()
    pod_cidrs: tuple[str, ...] = ()  # those of its Pods, as the API server has them
    occupied: Occupied = Occupied()  # what can be no VIP here


class VipMode(msgspec.Struct, frozen=True):
    """How VIPs become reachable; see the --vip-mode flag. `auto` has been resolved before planning."""

    route: bool = False  # make them local by a route
    loopback: bool = False  # serve a.b.c.d at 127.b.c.d
    serve: bool = True  # False: NodePorts and externalIPs only


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The operator's settings on which planning depends."""

    vip_mode: VipMode = VipMode(route=True)
    nodeport_addresses: tuple[str, ...] = ()  # CIDRs, or "primary"; () = all
    bind_addresses: tuple[str, ...] = ()  # NodePorts are opened on these only; () = all
    pod_cidrs: tuple[str, ...] = ()  # of the cluster's Pods; () = not known
    pods_by_node: bool = False  # the Node's podCIDRs are used instead
    localhost_nodeports: bool = True  # NodePorts are opened on loopback addresses too
    steer_external_ips: bool = True  # policy rules may take foreign addresses
    vip_ranges: tuple[str, ...] = ()  # CIDRs that clusterIPs come from
    protocols: frozenset[str] = frozenset({"TCP"})  # those that this build relays with its feature gates
