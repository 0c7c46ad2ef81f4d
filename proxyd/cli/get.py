"""`proxyd get` shows what the daemon serves: as a table, JSON, YAML or names; once, or at every change."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from proxyd.cli.client import Client
from proxyd.cli.columns import RESOURCES, Resource
from proxyd.cli.env import FAILED, OK, UNREACHABLE, USAGE, CommandError, Env
from proxyd.cli.output import json_line, json_text, yaml_text
from proxyd.cli.tables import Table, table
from proxyd.control.admin.schema import ConnectionsView
from proxyd.control.admin.selector import Selector, SelectorError

# All in seconds.
_WAIT = 25.0  # the daemon may take this long to say that nothing has changed
_PAUSE = 0.2  # between two answers: one change is often followed by many
_POLL = 1.0  # between two looks at the connections
_RESTART = 10.0  # a daemon that has gone may take this long to answer again
_RETRY = 0.25


def get(args: argparse.Namespace, env: Env) -> int:
    """Print items of one kind, once or with --watch until Ctrl-C.

    Raises:
        CommandError: kind or selector are wrong, there is none of that name, or the daemon does not answer.
    """
    if args.what not in RESOURCES:
        raise CommandError(
            f'unknown kind "{args.what}"; expected {", ".join(RESOURCES)}; see `proxyd get --help`',
            code=USAGE,
        )
    try:
        Selector(args.selector or "")
    except SelectorError as error:
        raise CommandError(str(error), code=USAGE) from None
    query = Query(args, Client(args.admin_socket))
    if args.watch:
        return Watch(query, env, args.output).run()
    items = query.fetch()
    if query.name and not items and args.what != "connections":
        hint = "; see `proxyd get services -A`" if args.what == "services" else ""
        raise CommandError(f"{query.resource.singular} {args.name}: not found{hint}", code=FAILED)
    match args.output:
        case "json":
            env.stdout.write(json_text({"items": items}))
        case "yaml":
            env.stdout.write(yaml_text({"items": items}))
        case "name":
            env.stdout.write("".join(f"{query.resource.name(item)}\n" for item in items))
        case _ if items:
            env.stdout.write(
                resource_table(
                    args.what, items, wide=args.output == "wide", colour=env.colour, width=env.width
                )
            )
        case _:
            env.say(f"no {args.what}{query.where}")
    for note in query.notes:
        env.say(note)
    return OK


def resource_table(
    what: str, items: Sequence[Any], *, wide: bool = False, colour: bool = False, width: int | None = None
) -> str:
    """The table that `get WHAT` prints.

    Args:
        what: services, endpoints, listeners or connections.
        items: what the daemon answered, of that kind.
        wide: show all columns, and shorten nothing.
        colour: whether escape sequences may be used.
        width: columns of the terminal; None where there is none.
    """
    resource = RESOURCES[what]
    headings = resource.headings(items, wide)
    rows = [resource.cells(item, headings) for item in items]
    return table(headings, rows, colour=colour, width=None if wide else width)


class Query:
    """What a command line asks of the daemon, and the answers.

    Attributes:
        what: services, endpoints, listeners or connections.
        resource: how items of that kind are read and shown.
        namespace: "" for all.
        name: the Service's; "" for all.
        where: the namespace in words, for "no services ...".
        notes: lines for standard error about the last answer.
    """

    def __init__(self, args: argparse.Namespace, client: Client) -> None:
        self.what: str = args.what
        self.resource: Resource = RESOURCES[args.what]
        self.notes: list[str] = []
        self.namespace, self.name = split_name(args.name, args.namespace)
        self.where = f" in namespace {self.namespace}" if self.namespace else ""
        self._client = client
        self._parameters = {
            "namespace": self.namespace,
            "name": self.name,
            "labelSelector": args.selector or "",
        }
        self._revision = ""

    def fetch(self) -> list[Any]:
        """The items at this moment."""
        if self.what == "connections":
            found = self._client.get("/v1/connections", ConnectionsView, self._parameters)
            self.notes = []
            if found.more:
                self.notes.append(f"and {found.more:,} more")
            for pid in found.silent_workers:
                self.notes.append(
                    f"proxyd: warning: worker {pid} did not answer; its connections are missing"
                )
            return list(found.items)
        return self._client.items(self.what, self.resource.kind, self._parameters)

    def fetch_change(self) -> list[Any] | None:
        """The items as soon as they may have changed; at once the first time. None: no change for a while."""
        if self.what == "connections":
            if self._revision:
                time.sleep(_POLL)
            self._revision = "any"
            return self.fetch()
        if self._revision:
            time.sleep(_PAUSE)
        found = self._client.changes(
            self.what, self.resource.kind, self._parameters, revision=self._revision, wait=_WAIT
        )
        if found is None:
            return None
        self._revision = found.revision
        return found.items

    def restart(self) -> None:
        """Ask for everything the next time: another daemon may answer."""
        self._revision = ""


class Watch:
    """`--watch` shows everything first, and then what changes."""

    def __init__(self, query: Query, env: Env, output: str) -> None:
        self._query = query
        self._env = env
        self._output = output
        self._known: dict[tuple[object, ...], Any] = {}
        self._table: Table | None = None
        self._headings: list[str] = []
        self._reached = False

    def run(self) -> int:
        """Go on until Ctrl-C. Returns the exit code.

        Raises:
            CommandError: the daemon never answered, or has not come back.
        """
        try:
            while True:
                items = self._next()
                if items is not None:
                    self._show(items)
        except KeyboardInterrupt:
            return OK

    def _next(self) -> list[Any] | None:
        deadline = None
        while True:
            try:
                items = self._query.fetch_change()
                self._reached = True
                return items
            except CommandError as error:
                # A daemon that has answered before may be starting again.
                if not self._reached or error.code != UNREACHABLE:
                    raise
                if deadline is None:
                    deadline = time.monotonic() + _RESTART
                    self._env.say("proxyd: warning: the daemon is gone; waiting for it to come back")
                if time.monotonic() > deadline:
                    raise
                self._query.restart()
                time.sleep(_RETRY)

    def _show(self, items: list[Any]) -> None:
        resource = self._query.resource
        now = {resource.key(item): item for item in items}
        changes = [
            ("ADDED" if key not in self._known else "CHANGED", item)
            for key, item in now.items()
            if key not in self._known
            or resource.without_counters(self._known[key]) != resource.without_counters(item)
        ]
        changes += [("REMOVED", item) for key, item in self._known.items() if key not in now]
        self._known = now
        if changes:
            self._env.stdout.write(self._text(changes))
            self._env.stdout.flush()

    def _text(self, changes: list[tuple[str, Any]]) -> str:
        resource = self._query.resource
        match self._output:
            case "json":
                return "".join(json_line({"event": event, "object": item}) for event, item in changes)
            case "yaml":
                return "".join(
                    "---\n" + yaml_text({"event": event, "object": item}) for event, item in changes
                )
            case "name":
                return "".join(f"{event} {resource.name(item)}\n" for event, item in changes)
        if self._table is None:
            wide = self._output == "wide"
            self._headings = resource.headings([item for _, item in changes], wide)
            width = None if wide else self._env.width
            self._table = Table(["EVENT", *self._headings], colour=self._env.colour, width=width)
        # The first column is as wide as CHANGED and REMOVED from the start.
        return self._table.draw(
            [[f"{event:<7}", *resource.cells(item, self._headings)] for event, item in changes]
        )


def split_name(name: str | None, namespace: str | None) -> tuple[str, str]:
    """Namespace and name to ask for, "" for any. A name like `prod/web` says both."""
    first, slash, rest = (name or "").partition("/")
    if slash:
        return first, rest
    return namespace or "", first
