"""`proxyd status` shows how the daemon is doing."""

from __future__ import annotations

import argparse
import time

from proxyd.cli.client import Client
from proxyd.cli.columns import address
from proxyd.cli.env import OK, Env
from proxyd.cli.output import json_text
from proxyd.cli.tables import clean, count, size
from proxyd.control.admin.schema import StatusView
from proxyd.control.config.durations import format_duration

_SAMPLE_SECONDS = 0.3  # between the two answers from which rates are computed
_SHOWN_AT_MOST = 10  # failing listeners, and problems


def status(args: argparse.Namespace, env: Env) -> int:
    """Print the daemon's state, and the rates of a short while."""
    client = Client(args.admin_socket)
    first = client.get("/v1/status", StatusView)
    if args.output == "json":
        env.stdout.write(json_text(first))
        return OK
    began = time.monotonic()
    time.sleep(_SAMPLE_SECONDS)
    second = client.get("/v1/status", StatusView)
    env.stdout.write(status_text(first, second, time.monotonic() - began, now=time.time()))
    return OK


def status_text(first: StatusView, second: StatusView, seconds: float, *, now: float) -> str:
    """The text of `proxyd status`.

    Args:
        first: the earlier answer of the daemon.
        second: the later one, which is shown.
        seconds: between the two.
        now: Unix time, for ages.
    """
    workers = sum(worker.state != "dead" for worker in second.workers)
    up = format_duration(second.uptime)
    lines = [
        f"proxyd {second.version}  {second.phase}  up {up}  pid {second.pid}  workers {workers}",
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
        f"{count(second.services, 'service')}  {count(wanted, 'listener')}{note}  "
        f"{count(second.endpoints, 'endpoint')}",
    )
    if second.vip_listen:
        why = f": {second.vip_listen_reason}" if second.vip_listen_reason else ""
        add("vips", f"{second.vip_listen}{why}")
    into = max(0, second.counters.bytes_in - first.counters.bytes_in) / max(seconds, 0.001)
    out = max(0, second.counters.bytes_out - first.counters.bytes_out) / max(seconds, 0.001)
    add("traffic", f"{count(second.connections, 'connection')}  {size(into)}/s in  {size(out)}/s out")
    restarts = sum(worker.restarts for worker in second.workers)
    if restarts:
        add("workers", f"{count(restarts, 'restart')} since the start")
    for listener in second.failing[:_SHOWN_AT_MOST]:
        text = f"{listener.service} {address(listener)}/{listener.protocol}: {listener.detail}"
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
