"""Steers by a policy rule for each port, where packets can't be marked (no `nft`, Linux before 5.9).

    ip rule: priority 112, to IP ipproto tcp dport PORT, lookup 7112; `unreachable` without an endpoint

The rules are a linear list, walked for every packet that is not local: right for tens of addresses. Clients
that are to be refused get an ICMP error or silence, and an endpoint that is itself a steered address and port
is never reached. Needs Linux 4.17 and CAP_NET_ADMIN.
"""

from __future__ import annotations

from collections.abc import Mapping

from proxyd.host.netlink import Netlink
from proxyd.host.policy_rules import RouteTable, add_rules, delete_rules, own_rules, rule_of_port, sources
from proxyd.state.spec import ListenerKey
from proxyd.state.spec import Steering as Action


def ports_present(netlink: Netlink) -> dict[ListenerKey, Action]:
    """What the rules do now, whichever process made them. For two rules of a key the first counts.

    Raises:
        OSError: netlink failed.
    """
    found: dict[ListenerKey, Action] = {}
    for rule in own_rules(netlink):
        if rule.key is not None and rule.action is not None:
            found.setdefault(rule.key, rule.action)
    return found


def steer_ports(
    netlink: Netlink, routes: RouteTable, wanted: Mapping[ListenerKey, Action]
) -> dict[ListenerKey, str]:
    """Have rules for these, and no others.

    A rule that changes is made before the old one goes, so that in between the old one is still in force and
    the traffic is never routed to the foreign host. The routes have a source: without it the node's own
    connections to the address would come from the address itself, and the answers to those to its other ports
    would be routed away.

    Args:
        netlink: of rtnetlink.
        routes: the table that the rules lead to.
        wanted: what becomes of each port.

    Returns:
        One line for each key that failed.

    Raises:
        OSError: netlink failed.
    """
    failed: dict[ListenerKey, str] = {}
    rules = {}
    for key, action in wanted.items():
        try:
            rules[key] = rule_of_port(key, action)
        except ValueError as error:
            failed[key] = f"cannot steer {key}: {error}"
    ips = {key.ip for key in rules if wanted[key] is Action.LOCAL}
    no_route = routes.add(sources(ips)) if ips else {}
    for key in [key for key in rules if key.ip in no_route and wanted[key] is Action.LOCAL]:
        failed[key] = f"cannot steer {key}: {no_route[key.ip]}"
        del rules[key]
    for rule, failure in add_rules(netlink, rules.values()).items():
        assert rule.key is not None
        failed[rule.key] = f"cannot steer {rule.key}: {failure.text}"
        del rules[rule.key]
    # What failed keeps the rule that it had.
    old = [
        rule
        for rule in own_rules(netlink)
        if rule.key is not None and rule.key not in failed and wanted.get(rule.key) is not rule.action
    ]
    for rule, failure in delete_rules(netlink, old).items():
        assert rule.key is not None
        failed[rule.key] = f"cannot stop steering {rule.key}: {failure.text}"
    return failed
