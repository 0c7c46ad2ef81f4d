"""The `proxyd` command: its parser, and what every subcommand has in common."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, NoReturn

from proxyd import __version__
from proxyd.cli.env import OK, USAGE, CommandError, Env

_INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def main(argv: Sequence[str] | None = None, env: Env | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; those of this process by default.
        env: what it may touch; this process's streams and environment by default.

    Returns:
        The exit code: 0 ok, 1 failed, 2 usage, 3 invalid configuration, 4 daemon unreachable.
    """
    own = env is None
    env = env or Env.here()
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv), env)
        env.stdout.flush()
    except CommandError as error:
        for line in error.lines:
            env.say(f"proxyd: error: {line}")
        return error.code
    except BrokenPipeError:
        # The reader has what it wanted, as in `proxyd get services | head`. What is still buffered must go nowhere.
        if own:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code


def _run(argv: list[str], env: Env) -> int:
    named = next((argument for argument in argv if not argument.startswith("-")), "")
    if named and named not in COMMANDS:
        raise CommandError(
            f'unknown command "{named}"; {_nearest(named, COMMANDS) or "see `proxyd --help`"}', code=USAGE
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
        # What argparse prints by itself is the help.
        self.env.stdout.write(message)


def build_parser(env: Env, only: str = "") -> argparse.ArgumentParser:
    """The parser of all commands and flags.

    Args:
        env: where help goes, and what some defaults depend on.
        only: the one command that needs its flags: the others are known by name alone, which is quicker.
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
            help=command.text,
            description=f"{command.text[0].upper()}{command.text[1:]}.",
            allow_abbrev=False,
            formatter_class=_formatter(env),
        )
        sub.set_defaults(run=command.run, parser=sub)
        if not only or only == name:
            command.flags(sub)
    return parser


def _formatter(env: Env) -> Callable[..., argparse.HelpFormatter]:
    columns = env.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and int(columns) >= 40 else 100
    if env.stdout.isatty() and not columns:
        with contextlib.suppress(OSError, ValueError):
            width = max(40, min(120, os.get_terminal_size(env.stdout.fileno()).columns))
    return lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=width)


def _add_settings(parser: argparse.ArgumentParser, *, only: Sequence[str] = ()) -> None:
    from proxyd.control.flags import FLAGS  # noqa: PLC0415 - other commands need not wait for it

    for flag in FLAGS:
        if only and flag.name not in only:
            continue
        names = [f"--{flag.name}", *([f"-{flag.short}"] if flag.short else [])]
        text = f"{flag.help} (default: {flag.default})".replace("%", "%%")
        if flag.kind == "count":
            parser.add_argument(*names, dest=flag.field, action="count", default=None, help=text)
        elif flag.kind == "switch":
            parser.add_argument(
                *names, dest=flag.field, nargs="?", const="true", metavar=flag.metavar, help=text
            )
        else:
            action = "append" if flag.kind == "repeat" else "store"
            parser.add_argument(*names, dest=flag.field, action=action, metavar=flag.metavar, help=text)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser, only=("workers", "admin-socket", "log-format", "verbosity"))


def _add_socket(parser: argparse.ArgumentParser) -> None:
    from proxyd.control.settings import Surroundings, client_admin_socket  # noqa: PLC0415 - as above

    env = parser.env if isinstance(parser, _Parser) else Env.here()
    default = client_admin_socket(Surroundings(uid=os.getuid(), environ=env.environ))
    parser.add_argument(
        "--admin-socket",
        metavar="PATH",
        default=default,
        help="Unix socket of the daemon (default: %(default)s)",
    )


def _add_output(parser: argparse.ArgumentParser, *formats: str) -> None:
    text = f"{', '.join(formats[:-1])} or {formats[-1]} (default: {formats[0]})"
    parser.add_argument("-o", "--output", choices=formats, default=formats[0], metavar="FORMAT", help=text)


def _add_get(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=("services", "endpoints", "listeners"), metavar="services|endpoints|listeners"
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="of one Service, or NAMESPACE/NAME (default: all)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "-A", "--all-namespaces", action="store_true", help="of all namespaces; this is the default"
    )
    where.add_argument("-n", "--namespace", metavar="NS", help="of one namespace (default: all)")
    _add_output(parser, "table", "wide", "json")
    _add_socket(parser)


def _add_status(parser: argparse.ArgumentParser) -> None:
    _add_socket(parser)
    _add_output(parser, "text", "json")


def _add_cleanup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be removed (default: remove it)"
    )
    _add_socket(parser)


def _add_version(parser: argparse.ArgumentParser) -> None:
    _add_output(parser, "text", "json")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="file or folder of manifests")
    parser.add_argument(
        "--explain",
        metavar="NAME",
        help="show what the Service NAME or NAMESPACE/NAME would get, and why (default: only what is wrong)",
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="errors only: no warnings, no summary (default: all)"
    )
    _add_output(parser, "text", "json")
    _add_settings(
        parser,
        only=(
            *("service-cluster-ip-range", "service-node-port-range", "allow-loopback-endpoints", "vip-mode"),
            *("external-ip-mode", "nodeport-addresses", "bind-address", "hostname-override", "config"),
        ),
    )


def _command_run(args: argparse.Namespace, env: Env) -> int:
    from proxyd.cli.run import run  # noqa: PLC0415 - as below: the daemon's libraries cost 200 ms

    return run(args, env)


def _command_demo(args: argparse.Namespace, env: Env) -> int:
    from proxyd.cli.demo import demo  # noqa: PLC0415 - each command imports its own needs

    return demo(args, env)


def _command_get(args: argparse.Namespace, env: Env) -> int:
    from proxyd.cli.show import get  # noqa: PLC0415 - as above

    return get(args, env)


def _command_status(args: argparse.Namespace, env: Env) -> int:
    from proxyd.cli.show import status  # noqa: PLC0415 - as above

    return status(args, env)


def _command_check(args: argparse.Namespace, env: Env) -> int:
    from proxyd.cli.check import check  # noqa: PLC0415 - as above

    return check(args, env)


def _command_cleanup(args: argparse.Namespace, env: Env) -> int:
    from proxyd.cli.cleanup import cleanup  # noqa: PLC0415 - as above

    return cleanup(args, env)


def _command_version(args: argparse.Namespace, env: Env) -> int:
    import platform  # noqa: PLC0415 - as above

    if args.output == "json":
        env.stdout.write(f'{{"version": "{__version__}", "python": "{platform.python_version()}"}}\n')
    else:
        env.stdout.write(f"proxyd {__version__}\n")
    return OK


def _dashes(argument: str) -> str:
    """A flag with `_` written as `-`, as kube-proxy's flags may be."""
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
    known = [flag for action in used._actions for flag in action.option_strings]  # noqa: SLF001 - argparse has no public list
    return f"unknown flag {name}; {_nearest(name, known) or see}"


def _nearest(word: str, known: Iterable[str]) -> str:
    """A question that names the known word most like this one; "" where none is."""
    import difflib  # noqa: PLC0415 - only for a mistake

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


class _Command(NamedTuple):
    """One subcommand: what it does, what its help says, and what adds its flags."""

    run: Callable[[argparse.Namespace, Env], int]
    text: str
    flags: Callable[[argparse.ArgumentParser], None]


COMMANDS = {
    "run": _Command(_command_run, "serve the Services of manifests in the foreground", _add_settings),
    "demo": _Command(_command_demo, "serve a small demo with its own backends, without root", _add_demo),
    "get": _Command(_command_get, "show services, endpoints or listeners of the running daemon", _add_get),
    "status": _Command(_command_status, "show how the running daemon is doing", _add_status),
    "check": _Command(
        _command_check, "check manifests without serving them; exit code 3 on errors", _add_check
    ),
    "cleanup": _Command(_command_cleanup, "remove what a killed proxyd left on this node", _add_cleanup),
    "version": _Command(_command_version, "print the version", _add_version),
}
