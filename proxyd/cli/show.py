"""`proxyd get` and `proxyd status`: what the daemon serves, as tables or JSON."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from proxyd.cli.client import Client
from proxyd.cli.env import FAILED, OK, CommandError, Env
from proxyd.cli.tables import NONE, clean, count, size, table
from proxyd.control.answers import EndpointView, ListenerView, PortView, ServiceView, StatusView
from proxyd.control.durations import format_duration

_SAMPLE_SECONDS = 0.3  # between the two answers that the rates are made of
_SHOWN_AT_MOST = 10


def get(args: argparse.Namespace, env: Env) -> int:
    """`proxyd get services|endpoints|listeners [NAME]`."""
    client = Client(args.admin_socket)
    kind: type[Any] = {"services": ServiceView, "endpoints": EndpointView, "listeners": ListenerView}[
        args.what
    ]
    namespace, name = _place(args)
    items = client.items(args.what, kind, namespace=namespace, name=name)
    if name and not items:
        raise CommandError(f"{_singular(args.what)} {args.name}: not found{_hint(args)}", code=FAILED)
    if args.output == "json":
        env.stdout.write(pretty({"items": items}))
        return OK
    if not items:
        env.say(f"no {args.what}{f' in namespace {namespace}' if namespace else ''}")
        return OK
    wide = args.output == "wide"
    draw: Any = {"services": services_table, "endpoints": endpoints_table, "listeners": listeners_table}[
        args.what
    ]
    env.stdout.write(draw(items, wide=wide, colour=env.colour))
    return OK


def status(args: argparse.Namespace, env: Env) -> int:
    """`proxyd status`."""
    client = Client(args.admin_socket)
    first = client.decode(client.get("/v1/status"), StatusView)
    if args.output == "json":
        env.stdout.write(pretty(first))
        return OK
    began = time.monotonic()
    time.sleep(_SAMPLE_SECONDS)
    second = client.decode(client.get("/v1/status"), StatusView)
    env.stdout.write(status_text(first, second, time.monotonic() - began, now=time.time()))
    return OK


def pretty(value: Any) -> str:
    """JSON for people and programs, indented, with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


def services_table(items: Sequence[ServiceView], *, wide: bool = False, colour: bool = False) -> str:
    """The table of `get services`."""
    headings = [
        "NAMESPACE",
        "NAME",
        "TYPE",
        "CLUSTER-IP",
        "EXTERNAL-IP",
        "PORT(S)",
        "ENDPOINTS",
        "CONNS",
        "STATUS",
    ]
    if wide:
        headings[-1:] = ["TOTAL", "FAILED", "IN", "OUT", "STATUS"]
    rows = []
    for item in items:
        endless = item.type == "ExternalName"
        row: list[object] = [
            item.namespace,
            item.name,
            item.type,
            ",".join(item.cluster_ips) or NONE,
            item.external_name or ",".join(item.external_ips) or NONE,
            ",".join(map(_port, item.ports)) or NONE,
            "-" if endless else f"{item.endpoints_ready}/{item.endpoints_total}",
            "-" if endless else item.connections,
        ]
        if wide:
            counters = item.counters
            row += [counters.opened, counters.failed, size(counters.bytes_in), size(counters.bytes_out)]
        rows.append([*row, item.status])
    return table(headings, rows, colour=colour)


def endpoints_table(items: Sequence[EndpointView], *, wide: bool = False, colour: bool = False) -> str:
    """The table of `get endpoints`."""
    del colour
    headings = [
        "NAMESPACE",
        "NAME",
        "PORT",
        "ENDPOINT",
        "READY",
        "SERVING",
        "TERMINATING",
        "CONNS",
        "TOTAL",
        "FAILED",
    ]
    if wide:
        headings += ["USED", "IN", "OUT", "NODE"]
    rows = []
    for item in items:
        row: list[object] = [
            item.namespace,
            item.name,
            f"{item.port}/{item.protocol}" if item.port else item.protocol,
            item.address,
            _yes(item.ready),
            _yes(item.serving),
            _yes(item.terminating),
            item.counters.active,
            item.counters.opened,
            item.counters.failed,
        ]
        if wide:
            row += [
                _yes(item.used),
                size(item.counters.bytes_in),
                size(item.counters.bytes_out),
                item.node or NONE,
            ]
        rows.append(row)
    return table(headings, rows)


def listeners_table(items: Sequence[ListenerView], *, wide: bool = False, colour: bool = False) -> str:
    """The table of `get listeners`. The column FOR is there where an address stands for another."""
    mapped = wide or any(item.mapped_from for item in items)
    headings = ["ADDRESS", "PORT", "PROTOCOL", "ROLE", *(["FOR"] if mapped else []), "SERVICE", "STATUS"]
    rows = [
        [
            item.address,
            item.port,
            item.protocol,
            item.role,
            *([item.mapped_from or NONE] if mapped else []),
            item.service,
            item.status,
        ]
        for item in items
    ]
    return table(headings, rows, colour=colour)


def status_text(first: StatusView, second: StatusView, seconds: float, *, now: float) -> str:
    """The text of `proxyd status`, from two answers that were given `seconds` apart."""
    workers = sum(worker.state != "dead" for worker in second.workers)
    lines = [
        f"proxyd {second.version}  {second.phase}  up {format_duration(second.uptime)}  pid {second.pid}  workers {workers}"
    ]

    def add(label: str, text: str) -> None:
        lines.append(f"  {label:<8} {clean(text)}")

    for source in second.sources:
        synced = "synced" if source.synced else "not synced yet"
        ago = (
            f", last event {format_duration(max(0.0, now - source.last_event))} ago"
            if source.last_event
            else ""
        )
        add("source", f"{source.name}  {synced}{ago}")
    wanted = sum(second.listeners.values())
    off = [
        f"{number} {_WORDS.get(state, state)}"
        for state, number in second.listeners.items()
        if state != "Serving"
    ]
    note = f" ({', '.join(off)})" if off else ""
    add(
        "state",
        f"{count(second.services, 'service')}  {count(wanted, 'listener')}{note}  {count(second.endpoints, 'endpoint')}",
    )
    into = max(0, second.counters.bytes_in - first.counters.bytes_in) / max(seconds, 0.001)
    out = max(0, second.counters.bytes_out - first.counters.bytes_out) / max(seconds, 0.001)
    add("traffic", f"{count(second.connections, 'connection')}  {size(into)}/s in  {size(out)}/s out")
    restarts = sum(worker.restarts for worker in second.workers)
    if restarts:
        add("workers", f"{count(restarts, 'restart')} since the start")
    for listener in second.failing[:_SHOWN_AT_MOST]:
        address = f"[{listener.address}]" if ":" in listener.address else listener.address
        text = f"{listener.service} {address}:{listener.port}/{listener.protocol}: {listener.detail}"
        add(_WORDS.get(listener.state, listener.state), text)
    if len(second.failing) > _SHOWN_AT_MOST:
        add("", f"and {len(second.failing) - _SHOWN_AT_MOST} more: proxyd get listeners")
    for problem in second.problems[:_SHOWN_AT_MOST]:
        add("problem", str(problem))
    if len(second.problems) > _SHOWN_AT_MOST:
        add("", f"and {count(len(second.problems) - _SHOWN_AT_MOST, 'more problem')}: proxyd status -o json")
    return "\n".join(lines) + "\n"


_WORDS = {
    "Failed": "failed",
    "Conflict": "conflict",
    "Disabled": "disabled",
    "NoEndpoints": "without endpoints",
}


def _place(args: argparse.Namespace) -> tuple[str, str]:
    """Namespace and name to ask for; "" for any. `prod/web` names both."""
    namespace, slash, name = (args.name or "").partition("/")
    if not slash:
        namespace, name = "", namespace
    return namespace or args.namespace or "", name


def _hint(args: argparse.Namespace) -> str:
    return "; see `proxyd get services -A`" if args.what == "services" else ""


def _singular(what: str) -> str:
    return "service" if what == "services" else f"{what} of service"


def _port(port: PortView) -> str:
    node = f":{port.node_port}" if port.node_port else ""
    return f"{port.port}{node}/{port.protocol}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
