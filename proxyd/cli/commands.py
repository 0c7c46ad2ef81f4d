"""The subcommands: what runs each, what its help says, and which flags it has."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from proxyd.cli.env import Env


class Command(NamedTuple):
    """One subcommand."""

    run: Callable[[argparse.Namespace, Env], int]  # returns the exit code
    text: str  # one line of the help
    # Adds the flags to a parser; some defaults depend on the environment.
    flags: Callable[[argparse.ArgumentParser, Mapping[str, str]], None]


def _run(module: str, function: str) -> Callable[[argparse.Namespace, Env], int]:
    """A function of a module that is imported when it is called: a command loads what it alone needs."""

    def run(args: argparse.Namespace, env: Env) -> int:
        command: Callable[[argparse.Namespace, Env], int] = getattr(
            importlib.import_module(f"proxyd.cli.{module}"), function
        )
        return command(args, env)

    return run


def _add_settings(parser: argparse.ArgumentParser, *, only: Sequence[str] = ()) -> None:
    from proxyd.control.config.flags import FLAGS  # noqa: PLC0415 - other commands need not wait for it

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


def _add_run(parser: argparse.ArgumentParser, _environ: Mapping[str, str]) -> None:
    from proxyd.control.config.kube_flags import ALIASES  # noqa: PLC0415 - as above

    # These make the help: `pflags` parses the command line.
    _add_settings(parser)
    more = parser.add_argument_group("as kube-proxy has them")
    for alias in ALIASES:
        if len(alias.name) > 1:
            text = f"--{alias.field.replace('_', '-')} by another name (default: the same)"
            more.add_argument(f"--{alias.name}", metavar=alias.metavar, help=text)
    more.add_argument(
        "--cleanup",
        action="store_true",
        help="remove what a killed proxyd left and the chains of kube-proxy's userspace mode, and end "
        "(default: serve)",
    )
    more.add_argument(
        "--init-only",
        action="store_true",
        help="do what needs most rights, which is removing kube-proxy's chains, and end (default: serve)",
    )
    more.add_argument(
        "--write-config-to",
        metavar="FILE",
        help="write what is in force as a configuration file, and end (default: serve)",
    )
    parser.epilog = (
        "kube-proxy's other flags are accepted; those that would change something are warned of. "
        "-v N, -vN and --v=N are klog's levels: 4 and more are debug."
    )


def _add_demo(parser: argparse.ArgumentParser, _environ: Mapping[str, str]) -> None:
    _add_settings(parser, only=("workers", "admin-socket", "log-format", "verbosity"))


def _add_socket(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    from proxyd.control.config.settings import Surroundings, client_admin_socket  # noqa: PLC0415 - as above

    default = client_admin_socket(Surroundings(uid=os.getuid(), environ=environ))
    parser.add_argument(
        "--admin-socket",
        metavar="PATH",
        default=default,
        help="Unix socket of the daemon (default: %(default)s)",
    )


def _add_output(parser: argparse.ArgumentParser, *formats: str) -> None:
    text = f"{', '.join(formats[:-1])} or {formats[-1]} (default: {formats[0]})"
    parser.add_argument("-o", "--output", choices=formats, default=formats[0], metavar="FORMAT", help=text)


def _add_get(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    kinds = ("services", "endpoints", "listeners", "connections")
    parser.add_argument("what", choices=kinds, metavar="|".join(kinds))
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="of one Service, or NAMESPACE/NAME (default: all)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "-A", "--all-namespaces", action="store_true", help="of all namespaces; this is the default"
    )
    where.add_argument("-n", "--namespace", metavar="NS", help="of one namespace (default: all)")
    parser.add_argument(
        "-l",
        "--selector",
        metavar="SELECTOR",
        help="of Services with these labels: key=value, key!=value, key in (a,b), key notin (a,b), key, "
        "!key; several with commas (default: all)",
    )
    parser.add_argument(
        "-w",
        "--watch",
        action="store_true",
        help="go on with what changes, until Ctrl-C; with -o json one object a line (default: show it once)",
    )
    _add_output(parser, "table", "wide", "json", "yaml", "name")
    _add_socket(parser, environ)


def _add_describe(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    parser.add_argument("what", choices=("service",), metavar="service")
    parser.add_argument("name", metavar="NAME", help="of the Service, or NAMESPACE/NAME")
    parser.add_argument(
        "-n", "--namespace", metavar="NS", help="of the Service (default: the only one that has it)"
    )
    _add_output(parser, "text", "json", "yaml")
    _add_socket(parser, environ)


def _add_top(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    from proxyd.cli.rates import SORTS  # noqa: PLC0415 - as above

    parser.add_argument(
        "--interval", metavar="DURATION", default="2s", help="between two samples (default: 2s)"
    )
    parser.add_argument(
        "--sort",
        choices=tuple(SORTS),
        default="rate",
        metavar="KEY",
        help=f"{', '.join(SORTS)} (default: rate)",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="print one sample and end, as without a terminal (default: until q or Ctrl-C)",
    )
    parser.add_argument("-n", "--namespace", metavar="NS", help="of one namespace (default: all)")
    _add_socket(parser, environ)


def _add_status(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    _add_output(parser, "text", "json")
    _add_socket(parser, environ)


def _add_drain(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    parser.add_argument(
        "--timeout",
        metavar="DURATION",
        help="how long connections may go on; 0 ends them at once (default: the daemon's --drain-timeout)",
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="do not wait until the daemon has ended (default: wait)"
    )
    _add_socket(parser, environ)


def _add_upgrade(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    _add_socket(parser, environ)


def _add_log_level(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    levels = ("debug", "info", "warning", "error")
    parser.add_argument(
        "level", nargs="?", choices=levels, metavar="LEVEL", help=f"{', '.join(levels)} (default: show it)"
    )
    _add_socket(parser, environ)


def _add_cleanup(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be removed (default: remove it)"
    )
    parser.add_argument(
        "--kube-proxy",
        action="store_true",
        help="remove the chains of kube-proxy's userspace mode too, KUBE-PORTALS-* and KUBE-NODEPORT-* "
        "(default: only name them)",
    )
    _add_socket(parser, environ)


def _add_version(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    parser.add_argument(
        "--daemon", action="store_true", help="and that of the daemon (default: of this command alone)"
    )
    _add_output(parser, "text", "json")
    _add_socket(parser, environ)


def _add_completion(parser: argparse.ArgumentParser, _environ: Mapping[str, str]) -> None:
    shells = ("bash", "zsh", "fish")
    parser.add_argument("shell", choices=shells, metavar="|".join(shells))


def _add_check(parser: argparse.ArgumentParser, _environ: Mapping[str, str]) -> None:
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
            *(
                "vip-listen",
                "external-ip-mode",
                "fwmark",
                "nodeport-addresses",
                "bind-address",
                "hostname-override",
                "config",
            ),
        ),
    )


COMMANDS = {
    "run": Command(
        _run("run", "run"), "serve the Services of manifests or of a cluster in the foreground", _add_run
    ),
    "demo": Command(
        _run("demo", "demo"), "serve a small demo with its own backends, without root", _add_demo
    ),
    "get": Command(
        _run("get", "get"),
        "show services, endpoints, listeners or connections of the running daemon",
        _add_get,
    ),
    "describe": Command(_run("describe", "describe"), "show everything about one Service", _add_describe),
    "top": Command(
        _run("top", "top"), "show rates and connections of services and endpoints as they change", _add_top
    ),
    "status": Command(_run("status", "status"), "show how the running daemon is doing", _add_status),
    "reload": Command(
        _run("operations", "reload"),
        "have the daemon read its configuration and manifests again; exit code 3 on errors",
        _add_status,
    ),
    "drain": Command(
        _run("operations", "drain"),
        "have the daemon stop accepting, finish its connections, and end",
        _add_drain,
    ),
    "upgrade": Command(
        _run("operations", "upgrade"),
        "have the installed program take the place of the running one; no connection is refused or lost",
        _add_upgrade,
    ),
    "log-level": Command(
        _run("operations", "log_level"), "show or set what the running daemon logs", _add_log_level
    ),
    "check": Command(
        _run("check", "check"), "check manifests without serving them; exit code 3 on errors", _add_check
    ),
    "cleanup": Command(
        _run("cleanup", "cleanup"), "remove what a killed proxyd left on this node", _add_cleanup
    ),
    "version": Command(_run("operations", "version"), "print the version", _add_version),
    "completion": Command(
        _run("completion", "completion"), "print a completion script for a shell", _add_completion
    ),
}
