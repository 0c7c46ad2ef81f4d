"""The `proxyd` command: finds the subcommand, parses its flags, runs it, and prints errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import NoReturn

from proxyd import __version__
from proxyd.cli.commands import COMMANDS
from proxyd.cli.env import FAILED, OK, USAGE, CommandError, Env

_CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_INTERRUPTED = 130  # 128 + SIGINT, as shells say it
KUBE_PROXY = "kube-proxy"  # called by this name, proxyd takes that program's flags


def main(argv: Sequence[str] | None = None, env: Env | None = None, program: str = "") -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; those of this process by default.
        env: streams and environment; those of this process by default.
        program: the name that the user called; that of this process by default. `kube-proxy` has no
            subcommands: it runs the daemon.

    Returns:
        The exit code: 0 ok, 1 failed, 2 usage, 3 invalid configuration, 4 daemon unreachable.
    """
    own = env is None
    env = env or Env.here()
    try:
        program = program or ("proxyd" if argv is not None else PurePath(sys.argv[0]).name)
        code = _run(list(sys.argv[1:] if argv is None else argv), env, program)
        env.stdout.flush()
    except CommandError as error:
        for line in error.lines:
            env.say(f"proxyd: error: {line}")
        return error.code
    except BrokenPipeError:
        # The reader has read enough, as in `proxyd get services | head`.
        if own:
            _discard_output()
        return OK
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        if own:
            _discard_output()
        env.say(f"proxyd: error: cannot write the output: {(error.strerror or '').lower()}")
        return FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code


def _discard_output() -> None:
    """Let what is still buffered go to /dev/null, or the interpreter prints an error when it ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str], env: Env, program: str) -> int:
    # Flags without a subcommand belong to `run`.
    flags_alone = argv[:1] and argv[0].startswith("-") and argv[0] not in {"-h", "--help", "--version"}
    if program == KUBE_PROXY or flags_alone:
        return _run_daemon(argv, env, program)
    if argv[:1] == ["run"]:
        return _run_daemon(argv[1:], env, program)
    named = next((argument for argument in argv if not argument.startswith("-")), "")
    if named and named not in COMMANDS:
        raise CommandError(
            f'unknown command "{named}"; {_suggestion(named, COMMANDS) or "see `proxyd --help`"}', code=USAGE
        )
    parser = build_parser(env, only=named or "none")
    try:
        args, unknown = parser.parse_known_args([_dashes(argument) for argument in argv])
    except _Exit as end:
        return end.code
    if unknown:
        raise CommandError(_unknown(unknown[0], args, parser), code=USAGE)
    if args.command is None:
        parser.print_help()
        return USAGE
    command: Callable[[argparse.Namespace, Env], int] = args.run
    return command(args, env)


def _run_daemon(argv: list[str], env: Env, program: str) -> int:
    from proxyd.cli.pflags import parse  # noqa: PLC0415 - other commands need not wait for it

    called = KUBE_PROXY if program == KUBE_PROXY else "proxyd run"
    given = parse(argv, called)
    if given.wants("help"):
        parser = build_parser(env, only="run", program=program)
        with contextlib.suppress(_Exit):
            parser.parse_args(["run", "--help"])
        return OK
    if given.wants("version"):
        env.stdout.write(f"proxyd {__version__}\n")
        return OK
    return COMMANDS["run"].run(argparse.Namespace(given=given, program=program), env)


class _Exit(Exception):  # noqa: N818 - not an error: help or a version was printed
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Parser(argparse.ArgumentParser):
    """A parser that prints to the streams of an Env, and whose errors are one line."""

    env: Env

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; see `{self.prog} --help`", code=USAGE)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            self.env.say(message.rstrip())
        raise _Exit(status)

    def _print_message(self, message: str, _file: object = None) -> None:
        # argparse itself prints the help and the version.
        self.env.stdout.write(message)


def build_parser(env: Env, only: str = "", program: str = "proxyd") -> argparse.ArgumentParser:
    """The parser of all commands and flags.

    Args:
        env: the streams that help goes to, and the environment that some defaults depend on.
        only: the only subcommand that gets its flags, which is quicker; "" for all.
        program: the name that the user called.
    """

    class Parser(_Parser):
        pass

    Parser.env = env
    parser = Parser(
        prog="proxyd",
        description="Userspace service proxy for Linux nodes, driven by Kubernetes Services.",
        epilog="Exit codes: 0 ok, 1 failed, 2 usage, 3 invalid configuration, 4 daemon unreachable.",
        allow_abbrev=False,
        formatter_class=_formatter(env),
    )
    parser.add_argument("--version", action="version", version=f"proxyd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            prog=KUBE_PROXY if program == KUBE_PROXY and name == "run" else None,
            help=command.text,
            description=f"{command.text[0].upper()}{command.text[1:]}.",
            allow_abbrev=False,
            formatter_class=_formatter(env),
        )
        sub.set_defaults(run=command.run, parser=sub)
        if not only or only == name:
            command.flags(sub, env.environ)
    return parser


def _formatter(env: Env) -> Callable[..., argparse.HelpFormatter]:
    columns = env.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and int(columns) >= 40 else 100
    if env.stdout.isatty() and not columns:
        with contextlib.suppress(OSError, ValueError):
            width = max(40, min(120, os.get_terminal_size(env.stdout.fileno()).columns))
    return lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=width)


def _dashes(argument: str) -> str:
    """A flag with `-` for each `_`: kube-proxy takes both."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _unknown(argument: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    used: argparse.ArgumentParser = getattr(args, "parser", parser)
    see = f"see `{used.prog} --help`"
    if not argument.startswith("-"):
        return f'unexpected argument "{argument}"; {see}'
    name = argument.split("=", 1)[0]
    actions = used._actions  # noqa: SLF001 - argparse has no public list
    known = [flag for action in actions for flag in action.option_strings]
    return f"unknown flag {name}; {_suggestion(name, known) or see}"


def _suggestion(word: str, known: Iterable[str]) -> str:
    """The question whether a known word was meant, the one most like this word; "" where none is."""
    import difflib  # noqa: PLC0415 - needed after a mistake alone

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""
