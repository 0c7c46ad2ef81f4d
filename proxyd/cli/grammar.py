"""The command line as data, taken from the parser: completion scripts and manual pages are made of it."""

from __future__ import annotations

import argparse
import io
from typing import NamedTuple

from proxyd.cli.commands import COMMANDS
from proxyd.cli.env import Env
from proxyd.cli.main import build_parser

# Arguments with these metavars name files.
_FILES = frozenset({"PATH", "FILE"})


class Argument(NamedTuple):
    """One flag or positional argument."""

    flags: tuple[str, ...]  # () of a positional argument
    metavar: str  # "" where a flag takes no value
    help: str  # the same on every machine
    choices: tuple[str, ...]
    repeatable: bool
    optional_value: bool

    @property
    def files(self) -> bool:
        """Whether it names a file."""
        return self.metavar in _FILES


class Subcommand(NamedTuple):
    """One subcommand."""

    name: str
    text: str
    arguments: tuple[Argument, ...]

    @property
    def flags(self) -> list[Argument]:
        """The arguments that begin with a dash."""
        return [argument for argument in self.arguments if argument.flags]

    @property
    def positionals(self) -> list[Argument]:
        """The arguments that have no name."""
        return [argument for argument in self.arguments if not argument.flags]


def subcommands() -> list[Subcommand]:
    """Every subcommand, in the order of the help."""
    env = Env(stdout=io.StringIO(), stderr=io.StringIO())
    parser = build_parser(env)
    actions = parser._actions  # noqa: SLF001 - argparse has no public list
    (commands,) = (action for action in actions if action.dest == "command")
    assert isinstance(commands.choices, dict)
    found = []
    for name, command in COMMANDS.items():
        sub: argparse.ArgumentParser = commands.choices[name]
        arguments = tuple(_argument(action) for action in sub._actions)  # noqa: SLF001 - as above
        found.append(Subcommand(name, command.text, arguments))
    return found


def _argument(action: argparse.Action) -> Argument:
    flag = bool(action.option_strings)
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    if action.dest == "admin_socket" and action.default:
        default = "/run/proxyd/admin.sock as root, else $XDG_RUNTIME_DIR/proxyd/admin.sock"
        text = f"Unix socket of the daemon (default: {default})"
    return Argument(
        flags=tuple(action.option_strings),
        metavar="" if flag and action.nargs == 0 else metavar,
        help=text,
        choices=tuple(map(str, action.choices or ())),
        repeatable=action.nargs == "+" or type(action).__name__ in {"_AppendAction", "_CountAction"},
        optional_value=action.nargs == "?",
    )
