"""Reads manifests for `proxyd check`: the objects, what the daemon would do with them, and every problem."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from proxyd.api.meta import ObjectName
from proxyd.api.problems import Problem, Severity
from proxyd.api.rules import Rules
from proxyd.api.service import Protocol, Service
from proxyd.cli.env import Env
from proxyd.cli.run import given_settings, load
from proxyd.control.config.file import Configuration
from proxyd.control.config.options import in_use_around, planning_options
from proxyd.control.config.settings import Settings, Surroundings
from proxyd.host import parked
from proxyd.host.addresses import node_addresses
from proxyd.host.holders import occupied
from proxyd.sources.manifests.locate import located
from proxyd.sources.manifests.source import ManifestSet, ManifestSource
from proxyd.sources.standalone.allocation import Allocations, taken_around
from proxyd.sources.standalone.allocation import Settings as AllocationSettings
from proxyd.sources.standalone.assemble import Assembled, assemble
from proxyd.state.desired import DesiredState, desired_state
from proxyd.state.occupied import Occupied
from proxyd.state.snapshot import NodeAddress, NodeView, Options
from proxyd.state.spec import ListenerKey, ListenerSpec, ListenerState, ListenerStatus, Role


class Reading(NamedTuple):
    """What was read, and what the daemon would make of it on this node.

    Attributes:
        manifests: the objects as the files have them.
        assembled: the objects as planning takes them.
        node: this node.
        options: what planning depends on beside the objects.
        desired: the plan.
        held: the process that uses a listener's port already, "" where it is unknown.
        problems: all of them, in order of file and line.
    """

    manifests: ManifestSet
    assembled: Assembled
    node: NodeView
    options: Options
    desired: DesiredState
    held: dict[ListenerKey, str]
    problems: list[Problem]


def settings_of_check(args: argparse.Namespace, env: Env) -> Settings:
    """The settings that the flags of `proxyd check` and its --config give. Warnings go to standard error.

    Raises:
        CommandError: with a line for each thing that is wrong.
    """
    values = {**given_settings(args), "manifests": args.paths}
    settings, warnings = load(Configuration(values, Surroundings.here(env.environ)))
    for warning in warnings:
        env.say(str(warning))
    return settings


def read(paths: list[str], settings: Settings) -> Reading:
    """Read manifests, and plan what the daemon would do with them if it had all privileges.

    Args:
        paths: files and folders.
        settings: of the daemon.
    """
    rules = Rules(
        node_port_range=settings.service_node_port_range,
        service_cidrs=settings.service_cluster_ip_range,
        allow_loopback_endpoints=settings.allow_loopback_endpoints,
        unknown_fields=True,
    )
    found = ManifestSource(paths, rules).scan()
    ranges = AllocationSettings(
        cluster_cidrs=settings.service_cluster_ip_range, node_port_range=settings.service_node_port_range
    )
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
    options = planning_options(settings)
    node = _node(settings, options)
    taken = taken_around(node.occupied, settings.service_cluster_ip_range)
    assembled = assemble(found, Allocations(), ranges, now, taken)
    desired = desired_state(assembled.snapshot, node, options)
    held: dict[ListenerKey, str] = {}
    with contextlib.suppress(OSError):  # a sandbox hides who uses a port
        held = occupied(desired.host.listeners, _parked(desired, settings))
    problems = located(
        {
            *found.problems,
            *assembled.problems,
            *_conflicts(found, desired.unopened),
            *_in_use(found, desired.host.listeners.values(), held),
        },
        paths,
    )
    problems.sort(key=lambda p: (p.file, p.line, p.column, p.subject, p.path, p.message))
    return Reading(found, assembled, node, options, desired, held, problems)


def _parked(desired: DesiredState, settings: Settings) -> set[ListenerKey]:
    """The listeners that the daemon would park, given all privileges."""
    if settings.vip_listen == "bound" or not parked.kernel_may_park():
        return set()
    vips = desired.host.vips
    return {key for key in desired.host.listeners if key.ip in vips and key.protocol is not Protocol.SCTP}


def _node(settings: Settings, options: Options) -> NodeView:
    addresses: tuple[NodeAddress, ...] = ()
    found = Occupied()
    with contextlib.suppress(OSError):  # a sandbox
        addresses = node_addresses()
        if options.vip_mode.route:
            found = in_use_around(settings, addresses)
    return NodeView(name=settings.node_name, addresses=addresses, occupied=found)


def _conflicts(found: ManifestSet, statuses: Iterable[ListenerStatus]) -> Iterator[Problem]:
    """A warning for every address that two Services want. The statuses of a NodePort give equal ones."""
    for status in statuses:
        if status.holder is not None:
            what = _what(status.key, status.role)
            yield _warning(
                found,
                status,
                f"{what} is held by Service {status.holder}, which comes first: one must change",
            )
        elif status.state is ListenerState.CONFLICT:
            yield _warning(found, status, status.detail)


def _in_use(
    found: ManifestSet, listeners: Iterable[ListenerSpec], held: Mapping[ListenerKey, str]
) -> Iterator[Problem]:
    """A warning for every address whose port another process of this node uses."""
    for listener in listeners:
        who = held.get(listener.key)
        if who is not None:
            what = _what(listener.key, listener.role)
            yield _warning(found, listener, f"{what} is in use on this node by {who or 'another process'}")


def _what(key: ListenerKey, role: Role) -> str:
    return f"NodePort {key.port}/{key.protocol}" if role is Role.NODE_PORT else str(key)


def _warning(found: ManifestSet, listener: ListenerSpec | ListenerStatus, message: str) -> Problem:
    """A warning about a listener, at the manifest's field that asks for it."""
    owner = ObjectName(listener.service_port.namespace, listener.service_port.name)
    service = found.services.get(owner)
    return Problem(
        file=found.origins.get((Service.__name__, owner), ""),
        severity=Severity.WARNING,
        kind=Service.__name__,
        object=str(owner),
        path=_field(listener, service) if service else "",
        message=message,
    )


def _field(listener: ListenerSpec | ListenerStatus, service: Service) -> str:
    spec = service.spec
    ip = listener.mapped_from or listener.key.ip
    match listener.role:
        case Role.NODE_PORT:
            wanted = listener.service_port
            for i, port in enumerate(spec.ports):
                if (port.name, port.protocol) == (wanted.port, wanted.protocol):
                    return f"spec.ports[{i}].nodePort"
        case Role.EXTERNAL_IP if ip in spec.external_ips:
            return f"spec.externalIPs[{spec.external_ips.index(ip)}]"
        case Role.LOAD_BALANCER:
            for i, ingress in enumerate(service.status.load_balancer.ingress):
                if ingress.ip == ip:
                    return f"status.loadBalancer.ingress[{i}].ip"
        case Role.CLUSTER_IP if ip in spec.cluster_ips:
            return f"spec.clusterIPs[{spec.cluster_ips.index(ip)}]"
        case _:
            pass
    return "spec.clusterIP"
