"""`proxyd describe service NAME` shows everything about one Service."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import quote

from proxyd.cli.client import Client
from proxyd.cli.columns import address, port_text, yes
from proxyd.cli.env import FAILED, OK, CommandError, Env
from proxyd.cli.get import split_name
from proxyd.cli.output import json_text, yaml_text
from proxyd.cli.tables import NONE, Status, clean, size, table
from proxyd.control.admin.schema import EndpointView, ServiceDescription, ServiceView
from proxyd.control.config.durations import format_duration


def describe(args: argparse.Namespace, env: Env) -> int:
    """Print one Service.

    Raises:
        CommandError: there is none of that name, or several.
    """
    client = Client(args.admin_socket)
    namespace, name = split_name(args.name, args.namespace)
    if not namespace:
        found = client.items("services", ServiceView, {"name": name})
        if len(found) > 1:
            names = ", ".join(f"{item.namespace}/{item.name}" for item in found[:5])
            more = ", ..." if len(found) > 5 else ""
            raise CommandError(
                f"there are {len(found)} services {name}: {names}{more}; name one", code=FAILED
            )
        if not found:
            raise CommandError(f"service {name} not found; see `proxyd get services -A`", code=FAILED)
        namespace = found[0].namespace
    path = f"/v1/services/{quote(namespace, safe='')}/{quote(name, safe='')}"
    description = client.get(path, ServiceDescription)
    match args.output:
        case "json":
            env.stdout.write(json_text(description))
        case "yaml":
            env.stdout.write(yaml_text(description))
        case _:
            env.stdout.write(
                description_text(description, now=time.time(), colour=env.colour, width=env.width)
            )
    return OK


def description_text(
    description: ServiceDescription, *, now: float, colour: bool = False, width: int | None = None
) -> str:
    """The description for people, in several lines.

    Args:
        description: what the daemon answered.
        now: Unix time, for ages.
        colour: whether escape sequences may be used.
        width: columns of the terminal; None where there is none.
    """
    lines: list[str] = []

    def add(label: str, value: str) -> None:
        lines.append(f"{label + ':':<19}{clean(value) or NONE}")

    service = description.service
    add("Name", service.name)
    add("Namespace", service.namespace)
    add("Labels", _pairs(service.labels))
    add("Status", service.status)
    add("Type", service.type)
    if service.external_name:
        add("External name", service.external_name)
    else:
        _add_addresses(add, description)
    counters = service.counters
    add("Connections", f"{service.connections:,} now, {counters.opened:,} since the start")
    add("Failed", f"{counters.failed:,} found no endpoint, {counters.refused:,} refused")
    add("Bytes", f"{size(counters.bytes_in)} in, {size(counters.bytes_out)} out")
    if description.created:
        add("Created", description.created)

    def section(heading: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        lines.append(f"{heading}:{'' if rows else f' {NONE}'}")
        if rows:
            inside = None if width is None else width - 2
            drawn = table(headings, rows, colour=colour, width=inside)
            lines.extend(f"  {row}" for row in drawn.splitlines())

    section(
        "Listeners",
        ["ADDRESS", "ROLE", "PORT", "STATUS"],
        [
            [
                f"{address(one)}/{one.protocol}",
                one.role,
                one.port_name or "-",
                Status(one.state, one.status),
            ]
            for one in description.listeners
        ],
    )
    section(
        "Endpoints",
        ["ENDPOINT", "PORT", "READY", "USED", "CONNS", "TOTAL", "FAILED", "ATTEMPTS", "CONNECT", "IN", "OUT"],
        [_endpoint(one) for one in description.endpoints],
    )
    section(
        "Failures",
        ["AGO", "COUNT", "ENDPOINT", "PORT", "WHAT"],
        [
            [_ago(one.time, now), one.count, one.endpoint or "-", one.port or "-", one.why]
            for one in description.failures
        ],
    )
    section(
        "Events",
        ["AGO", "WHAT"],
        [[_ago(one.time, now), one.what] for one in description.events],
    )
    return "\n".join(lines) + "\n"


def _add_addresses(add: Callable[[str, str], None], description: ServiceDescription) -> None:
    service = description.service
    add("Cluster IP", ", ".join(service.cluster_ips))
    if service.external_ips:
        add("External IPs", ", ".join(service.external_ips))
    ports = [f"{port.name} " * bool(port.name) + port_text(port) for port in service.ports]
    add(
        "Ports",
        ", ".join(f"{shown} to {port.target_port}" for shown, port in zip(ports, service.ports, strict=True)),
    )
    add("Selector", _pairs(description.selector))
    seconds = description.affinity_seconds
    add("Session affinity", f"ClientIP, {format_duration(seconds)} idle" if seconds else "None")
    policies = f"internal {description.internal_traffic_policy}"
    if description.external_traffic_policy:
        policies += f", external {description.external_traffic_policy}"
    add("Traffic policy", policies)
    if description.source_ranges:
        add("Source ranges", ", ".join(description.source_ranges))


def _endpoint(one: EndpointView) -> list[object]:
    counters = one.counters
    mean = f"{counters.connect_us / counters.opened / 1000:.2f} ms" if counters.opened else "-"
    return [
        one.address,
        one.port or "-",
        "terminating" if one.terminating else yes(one.ready),
        yes(one.used),
        counters.active,
        counters.opened,
        counters.failed,
        counters.attempts,
        mean,
        size(counters.bytes_in),
        size(counters.bytes_out),
    ]


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))


def _ago(when: float, now: float) -> str:
    return format_duration(max(0.0, now - when))
