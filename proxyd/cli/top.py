"""`proxyd top` shows rates of services and endpoints: live on a terminal, once elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from proxyd.cli.client import Client
from proxyd.cli.env import OK, USAGE, CommandError, Env
from proxyd.cli.rates import HEADINGS, Row, Sample, cells, endpoint_rows, service_rows
from proxyd.cli.tables import COLOURS, clean, count, size, table
from proxyd.control.admin.schema import EndpointView, ServiceView, StatusView
from proxyd.control.config.durations import format_duration, parse_duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_FIRST_SECONDS = 1.0  # at most, between the two samples that are shown first
_KEYS = {"r": "rate", "c": "connections", "i": "in", "o": "out", "f": "failures", "n": "name"}


def top(args: argparse.Namespace, env: Env) -> int:
    """Show rates until q or Ctrl-C; with --once, or without a terminal, print them once.

    Raises:
        CommandError: --interval is wrong, or the daemon does not answer.
    """
    try:
        interval = parse_duration(args.interval)
    except ValueError as error:
        raise CommandError(f"--interval: {error}", code=USAGE) from None
    if not 0.1 <= interval <= 3600:
        raise CommandError(
            f'--interval: expected a duration from 100ms to 1h, got "{args.interval}"', code=USAGE
        )
    sampler = _Sampler(Client(args.admin_socket), args.namespace or "")
    if args.once or not env.stdout.isatty():
        before = sampler.sample()
        time.sleep(min(interval, _FIRST_SECONDS))
        env.stdout.write(once(before, sampler.sample(), args.sort, width=env.width))
        return OK
    try:
        return _live(sampler, args.sort, interval, env)
    except KeyboardInterrupt:
        return OK


def once(before: Sample, after: Sample, sort: str, *, width: int | None = None) -> str:
    """The tables of services and endpoints as plain text."""
    services = [[clean(row.name), *cells(row), row.status] for row in service_rows(before, after, sort)]
    endpoints = [[row.name, row.endpoint, *cells(row)] for row in endpoint_rows(before, after, sort)]
    return (
        table(["SERVICE", *HEADINGS, "STATUS"], services, width=width)
        + "\n"
        + table(["SERVICE", "ENDPOINT", *HEADINGS], endpoints, width=width)
    )


class _Sampler:
    """Takes samples of the daemon's counters."""

    def __init__(self, client: Client, namespace: str) -> None:
        self._client = client
        self._query = {"namespace": namespace}

    def sample(self) -> Sample:
        services = self._client.items("services", ServiceView, self._query)
        endpoints = self._client.items("endpoints", EndpointView, self._query)
        return Sample(time.monotonic(), services, endpoints)

    def status(self) -> StatusView:
        return self._client.get("/v1/status", StatusView)


def _live(sampler: _Sampler, sort: str, interval: float, env: Env) -> int:
    from rich.console import Console  # noqa: PLC0415 - 100 ms that no other command waits for
    from rich.live import Live  # noqa: PLC0415 - as above

    console = Console(file=env.stdout, no_color=bool(env.environ.get("NO_COLOR")), highlight=False)
    before = sampler.sample()
    wait = min(interval, _FIRST_SECONDS)
    after = before
    with _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_screen(console, sampler.status(), before, after, sort), refresh=True)
            due = time.monotonic() + wait
            while (left := due - time.monotonic()) > 0:
                key = keys(left)
                if key in {"q", "Q"}:
                    return OK
                if key in _KEYS:
                    sort = _KEYS[key]
                    live.update(_screen(console, sampler.status(), before, after, sort), refresh=True)
            before, after = after, sampler.sample()
            wait = interval


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Gives a function that waits some seconds for a key. It returns "" where none was pressed."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def key(seconds: float) -> str:
        readable, _, _ = select.select([descriptor], [], [], seconds)
        if not readable:
            return ""
        pressed = os.read(descriptor, 32).decode("utf-8", "replace")
        # Nothing can be read once the terminal is gone. Several characters are an arrow key or were pasted.
        return "q" if not pressed else pressed if len(pressed) == 1 else ""

    try:
        tty.setcbreak(descriptor)
        yield key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _no_key(seconds: float) -> str:
    time.sleep(seconds)
    return ""


def _screen(console: Console, status: StatusView, before: Sample, after: Sample, sort: str) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415 - as above

    services, endpoints = service_rows(before, after, sort), endpoint_rows(before, after, sort)
    # Lines that are no rows: two of the head, two empty ones, two of headings, the keys; one stays free.
    room = max(2, console.height - 8)
    shown = min(len(services), max(room // 2, room - len(endpoints)))
    shown_endpoints = min(len(endpoints), max(0, room - shown))
    seconds = max(0.001, after.time - before.time)
    into, out = sum(row.bytes_in for row in services), sum(row.bytes_out for row in services)
    listeners = ", ".join(f"{number} {state}" for state, number in status.listeners.items()) or "none"
    head = Text(
        f"proxyd {status.version}  {status.phase}  up {format_duration(status.uptime)}  "
        f"workers {len(status.workers)}  listeners {listeners}\n"
        f"{count(status.connections, 'connection')}  {sum(row.rate for row in services):,.1f} new/s  "
        f"{size(into)}/s in  {size(out)}/s out  every {format_duration(seconds)}",
        no_wrap=True,
        overflow="ellipsis",
    )
    keys = Text(no_wrap=True, overflow="ellipsis")
    for key, name in _KEYS.items():
        keys.append(f" {key} ", style="reverse")
        keys.append(f"{name} ", style="bold" if name == sort else "")
    keys.append(" q ", style="reverse")
    keys.append("quit")
    if len(services) > shown or len(endpoints) > shown_endpoints:
        keys.append(
            f"   {shown} of {len(services)} services, {shown_endpoints} of {len(endpoints)} endpoints",
            style="dim",
        )
    return Group(
        head,
        "",
        _table(services[:shown], sort, endpoints=False),
        "",
        _table(endpoints[:shown_endpoints], sort, endpoints=True),
        keys,
    )


def _table(rows: list[Row], sort: str, *, endpoints: bool) -> Table:
    from rich.table import Table  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415 - as above

    drawn = Table(box=None, padding=(0, 2, 0, 0), expand=True, header_style="bold")
    drawn.add_column("SERVICE", no_wrap=True, ratio=3)
    if endpoints:
        drawn.add_column("ENDPOINT", no_wrap=True, ratio=2)
    sorted_by = {"connections": 0, "rate": 1, "in": 2, "out": 3, "failures": 4}.get(sort, -1)
    for number, heading in enumerate(HEADINGS):
        style = "bold" if number == sorted_by else ""
        drawn.add_column(heading, justify="right", no_wrap=True, style=style)
    if not endpoints:
        drawn.add_column("STATUS", no_wrap=True, ratio=2)
    for row in rows:
        name = [Text(clean(row.name))]
        figures = [Text(figure) for figure in cells(row)]
        if row.failed:
            figures[4].stylize("red")
        if endpoints:
            drawn.add_row(*name, Text(row.endpoint), *figures)
        else:
            style = COLOURS.get(row.state, "")
            drawn.add_row(*name, *figures, Text(clean(row.status), style=style))
    return drawn
