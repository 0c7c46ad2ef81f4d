"""Clients inside of the cluster, Pods and this node, use a Service in spite of externalTrafficPolicy Local.

If a Service with that policy has no endpoint on this node, traffic from outside is refused: the load balancer
should send it to another node. But what a Pod of this node sends to the load balancer's address never gets
there, as this node takes that address. So any endpoint may serve it, as in kubernetes
pkg/proxy/iptables/proxier.go ("pod traffic" and "LOCAL traffic" of the KUBE-EXT- chains).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

import msgspec

from proxyd.api.service import TrafficPolicy
from proxyd.state.snapshot import NodeView, Options
from proxyd.state.spec import BalancerKey, BalancerSpec, ListenerSpec


def inside_ranges(node: NodeView, options: Options) -> tuple[str, ...]:
    """The CIDRs of the cluster's Pods and this node's addresses; () if the Pods' are not known."""
    pods = node.pod_cidrs if options.pods_by_node else options.pod_cidrs
    return (*pods, *(address.ip for address in node.addresses)) if pods else ()


def admit_inside(
    listeners: list[ListenerSpec],
    chosen: dict[BalancerKey, BalancerSpec],
    ranges: tuple[str, ...],
    balance: Callable[[BalancerKey], BalancerSpec],
) -> list[ListenerSpec]:
    """Open listeners at foreign addresses without an endpoint on this node for clients inside alone.

    Args:
        listeners: those of one service port.
        chosen: the balancers by key; those of such listeners are added.
        ranges: as `inside_ranges` returns them.
        balance: makes a balancer.
    """
    if not ranges:
        return listeners
    found = []
    for listener in listeners:
        key = listener.balancer
        shut = listener.steered and key.policy is TrafficPolicy.LOCAL and not chosen[key].endpoints
        # A Service with source ranges of its own stays shut: few clients would be in both ranges.
        if shut and not listener.source_ranges:
            everywhere = key._replace(policy=TrafficPolicy.CLUSTER)
            mine = tuple(one for one in ranges if ipaddress.ip_network(one).version == key.family)
            if everywhere not in chosen:
                chosen[everywhere] = balance(everywhere)
            if mine and chosen[everywhere].endpoints:
                found.append(msgspec.structs.replace(listener, balancer=everywhere, source_ranges=mine))
                continue
        found.append(listener)
    return found
