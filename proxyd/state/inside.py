"""Who is inside of the cluster: its Pods and this node, whom externalTrafficPolicy Local does not shut out.

Of a Service with that policy and without an endpoint on this node, traffic from outside is refused here: the
load balancer is to send it to another node. What a Pod of this node sends to the load balancer's address
never gets there, as that address is taken here; so it goes to any endpoint (kubernetes
pkg/proxy/iptables/proxier.go: "pod traffic" and "LOCAL traffic" of the KUBE-EXT- chains).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

import msgspec

from proxyd.api.service import TrafficPolicy
from proxyd.state.snapshot import NodeView, Options
from proxyd.state.spec import BalancerKey, BalancerSpec, ListenerSpec


def inside_ranges(node: NodeView, options: Options) -> tuple[str, ...]:
    """CIDRs of the cluster's Pods, and this node's addresses; () where the Pods' are not known."""
    pods = node.pod_cidrs if options.pods_by_node else options.pod_cidrs
    return (*pods, *(address.ip for address in node.addresses)) if pods else ()


def admit_inside(
    listeners: list[ListenerSpec],
    chosen: dict[BalancerKey, BalancerSpec],
    ranges: tuple[str, ...],
    balance: Callable[[BalancerKey], BalancerSpec],
) -> list[ListenerSpec]:
    """Give listeners at foreign addresses that have no endpoint on this node to the clients inside.

    Args:
        listeners: of one service port.
        chosen: balancers by key; those of such listeners are added.
        ranges: as from `inside_ranges`.
        balance: makes a balancer.
    """
    if not ranges:
        return listeners
    found = []
    for listener in listeners:
        key = listener.balancer
        shut = listener.steered and key.policy is TrafficPolicy.LOCAL and not chosen[key].endpoints
        # With ranges of the Service's own only who is in both might come: too few to go to any length.
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
