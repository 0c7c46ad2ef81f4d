"""`proxyd get`: what the daemon serves, as tables, JSON, YAML or names; once, or whenever it changes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from proxyd.cli.client import Client
from proxyd.cli.columns import NOUNS, Noun
from proxyd.cli.env import FAILED, OK, UNREACHABLE, USAGE, CommandError, Env
from proxyd.cli.output import line, pretty, yaml
from proxyd.cli.tables import Table, table
from proxyd.control.admin.schema import ConnectionsView
from proxyd.control.admin.selector import Selector, SelectorError

_WAIT = 25.0  # seconds that the daemon may take to say that nothing has changed
_BETWEEN = 0.2  # seconds between two answers: changes come in crowds
_POLL = 1.0  # connections are asked for so often
_COMES_BACK = 10.0  # seconds that a daemon has to start again
_RETRY = 0.25


def get(args: argparse.Namespace, env: Env) -> int:
    """`proxyd get services|endpoints|listeners|connections [NAME]`."""
    if args.what not in NOUNS:
        raise CommandError(
            f'unknown kind "{args.what}"; expected {", ".join(NOUNS)}; see `proxyd get --help`', code=USAGE
        )
    try:
        Selector(args.selector or "")
    except SelectorError as error:
        raise CommandError(str(error), code=USAGE) from None
    asking = Asking(args, Client(args.admin_socket))
    if args.watch:
        return Watch(asking, env, args.output).run()
    items = asking.now()
    if asking.name and not items and args.what != "connections":
        hint = "; see `proxyd get services -A`" if args.what == "services" else ""
        raise CommandError(f"{asking.noun.singular} {args.name}: not found{hint}", code=FAILED)
    match args.output:
        case "json":
            env.stdout.write(pretty({"items": items}))
        case "yaml":
            env.stdout.write(yaml({"items": items}))
        case "name":
            env.stdout.write("".join(f"{asking.noun.name(item)}\n" for item in items))
        case _ if items:
            env.stdout.write(
                noun_table(args.what, items, wide=args.output == "wide", colour=env.colour, width=env.width)
            )
        case _:
            env.say(f"no {args.what}{asking.where}")
    for note in asking.notes:
        env.say(note)
    return OK


def noun_table(
    what: str, items: Sequence[Any], *, wide: bool = False, colour: bool = False, width: int | None = None
) -> str:
    """The table of `get WHAT`.

    Args:
        what: services, endpoints, listeners or connections.
        items: of that kind.
        wide: with all columns; it is not shortened.
        colour: whether escape sequences may be used.
        width: of the terminal; None where there is none.
    """
    noun = NOUNS[what]
    headings = noun.headings(items, wide)
    rows = [noun.cells(item, headings) for item in items]
    return table(headings, rows, colour=colour, width=None if wide else width)


class Asking:
    """What is asked for, and how."""

    def __init__(self, args: argparse.Namespace, client: Client) -> None:
        self.what: str = args.what
        self.noun: Noun = NOUNS[args.what]
        self.notes: list[str] = []
        self.namespace, self.name = place(args.name, args.namespace)
        self.where = f" in namespace {self.namespace}" if self.namespace else ""
        self._client = client
        self._query = {
            "namespace": self.namespace,
            "name": self.name,
            "labelSelector": args.selector or "",
        }
        self._revision = ""

    def now(self) -> list[Any]:
        """The items at this moment."""
        if self.what == "connections":
            found = self._client.get("/v1/connections", ConnectionsView, self._query)
            self.notes = []
            if found.more:
                self.notes.append(f"and {found.more:,} more")
            for pid in found.silent_workers:
                self.notes.append(
                    f"proxyd: warning: worker {pid} did not answer; its connections are missing"
                )
            return list(found.items)
        return self._client.items(self.what, self.noun.kind, self._query)

    def next(self) -> list[Any] | None:
        """The items when they may have changed; None where they have not for a while."""
        if self.what == "connections":
            if self._revision:
                time.sleep(_POLL)
            self._revision = "any"
            return self.now()
        if self._revision:
            time.sleep(_BETWEEN)
        found = self._client.changes(
            self.what, self.noun.kind, self._query, revision=self._revision, wait=_WAIT
        )
        if found is None:
            return None
        self._revision = found.revision
        return found.items

    def forget(self) -> None:
        """Another daemon may answer the next time: ask for everything."""
        self._revision = ""


class Watch:
    """`--watch`: first everything, then what changes."""

    def __init__(self, asking: Asking, env: Env, output: str) -> None:
        self._asking = asking
        self._env = env
        self._output = output
        self._known: dict[tuple[object, ...], Any] = {}
        self._table: Table | None = None
        self._headings: list[str] = []
        self._reached = False

    def run(self) -> int:
        """Until Ctrl-C, or until the daemon is gone for good."""
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
                items = self._asking.next()
                self._reached = True
                return items
            except CommandError as error:
                # It may be starting again. One that never answered is another matter.
                if not self._reached or error.code != UNREACHABLE:
                    raise
                if deadline is None:
                    deadline = time.monotonic() + _COMES_BACK
                    self._env.say("proxyd: warning: the daemon is gone; waiting for it to come back")
                if time.monotonic() > deadline:
                    raise
                self._asking.forget()
                time.sleep(_RETRY)

    def _show(self, items: list[Any]) -> None:
        noun = self._asking.noun
        now = {noun.key(item): item for item in items}
        changes = [
            ("ADDED" if key not in self._known else "CHANGED", item)
            for key, item in now.items()
            if key not in self._known or noun.still(self._known[key]) != noun.still(item)
        ]
        changes += [("REMOVED", item) for key, item in self._known.items() if key not in now]
        self._known = now
        if changes:
            self._env.stdout.write(self._text(changes))
            self._env.stdout.flush()

    def _text(self, changes: list[tuple[str, Any]]) -> str:
        noun = self._asking.noun
        match self._output:
            case "json":
                return "".join(line({"event": event, "object": item}) for event, item in changes)
            case "yaml":
                return "".join("---\n" + yaml({"event": event, "object": item}) for event, item in changes)
            case "name":
                return "".join(f"{event} {noun.name(item)}\n" for event, item in changes)
        if self._table is None:
            wide = self._output == "wide"
            self._headings = noun.headings([item for _, item in changes], wide)
            width = None if wide else self._env.width
            self._table = Table(["EVENT", *self._headings], colour=self._env.colour, width=width)
        # As wide as the longest word from the beginning.
        return self._table.draw(
            [[f"{event:<7}", *noun.cells(item, self._headings)] for event, item in changes]
        )


def place(name: str | None, namespace: str | None) -> tuple[str, str]:
    """Namespace and name to ask for; "" for any. `prod/web` names both."""
    first, slash, rest = (name or "").partition("/")
    if slash:
        return first, rest
    return namespace or "", first
