"""`proxyd reload`, `drain`, `upgrade`, `log-level` and `version`: what an operator has the daemon do."""

from __future__ import annotations

import argparse
import platform
import time

from proxyd import __version__
from proxyd.api.problems import Severity
from proxyd.cli.client import Client, UnreachableError
from proxyd.cli.env import INVALID, OK, USAGE, CommandError, Env
from proxyd.cli.output import json_text
from proxyd.cli.tables import clean, count
from proxyd.control.admin.schema import (
    DrainView,
    LogLevelView,
    ReloadView,
    StatusView,
    UpgradeView,
    VersionView,
)
from proxyd.control.config.durations import format_duration, parse_duration

# All in seconds.
_POLL = 0.2
_SAY_EVERY = 5.0  # between two lines about a drain that goes on
_GRACE = 15.0  # the daemon may need so long after the drain to remove its routes and end
_UPGRADE = 90.0  # the new program serves within this time


def reload(args: argparse.Namespace, env: Env) -> int:
    """Have everything read again, and wait for it. Exit code 3 if there are errors."""
    found = Client(args.admin_socket).send("POST", "/v1/reload", ReloadView)
    errors = sum(problem.severity is Severity.ERROR for problem in found.problems) + len(found.configuration)
    if args.output == "json":
        env.stdout.write(json_text(found))
        return INVALID if errors else OK
    for line in found.configuration:
        env.stdout.write(clean(line) + "\n")
    if found.configuration:
        env.stdout.write("the configuration is not valid: the earlier one stays in force\n")
    for problem in found.problems:
        env.stdout.write(clean(str(problem)) + "\n")
    warnings = len(found.problems) + len(found.configuration) - errors
    env.stdout.write(
        f"read {count(found.files, 'file')}, {count(found.services, 'service')}: "
        f"{count(errors, 'error')}, {count(warnings, 'warning')}\n"
    )
    return INVALID if errors else OK


def drain(args: argparse.Namespace, env: Env) -> int:
    """Have the daemon stop accepting, finish its connections and end; wait for it, but with --no-wait.

    Raises:
        CommandError: --timeout is wrong, or the daemon has not ended in time.
    """
    query = {}
    if args.timeout is not None:
        try:
            query["timeout"] = f"{parse_duration(args.timeout):g}"
        except ValueError as error:
            raise CommandError(f"--timeout: {error}", code=USAGE) from None
    client = Client(args.admin_socket)
    pid = client.get("/v1/version", VersionView).pid
    began = client.send("POST", "/v1/drain", DrainView, query)
    limit = format_duration(began.timeout_seconds)
    env.stdout.write(f"draining {count(began.connections, 'connection')}, {limit} at most\n")
    env.stdout.flush()
    if args.no_wait:
        return OK
    deadline = time.monotonic() + began.timeout_seconds + _GRACE
    say = time.monotonic() + _SAY_EVERY
    while time.monotonic() < deadline:
        try:
            status = client.get("/v1/status", StatusView)
        except CommandError:
            break
        if status.pid != pid or status.phase != "draining":
            env.stdout.write("it has ended, and another has started in its place\n")
            return OK
        if time.monotonic() >= say:
            say = time.monotonic() + _SAY_EVERY
            env.stdout.write(f"{count(status.connections, 'connection')} left\n")
            env.stdout.flush()
        time.sleep(_POLL)
    else:
        raise UnreachableError("the daemon has not ended in time; see its log")
    env.stdout.write("it has ended\n")
    return OK


def upgrade(args: argparse.Namespace, env: Env) -> int:
    """Have the installed program take the place of the running one, and wait until it serves.

    Raises:
        CommandError: the daemon refuses, or the new program does not serve in time.
    """
    client = Client(args.admin_socket)
    began = time.monotonic()
    before = client.send("POST", "/v1/upgrade", UpgradeView)
    while time.monotonic() < began + _UPGRADE:
        try:
            status = client.get("/v1/status", StatusView)
        except CommandError:
            status = None  # no program answers while one replaces the other
        if status is not None and status.started != before.started and status.phase == "serving":
            break
        time.sleep(_POLL)
    else:
        raise UnreachableError("the new program does not serve; see the log")
    left = (
        f", {count(len(status.leaving_workers), 'worker')} of before still relay"
        if status.leaving_workers
        else ""
    )
    env.stdout.write(
        f"proxyd {before.version} made way for {status.version}, pid {status.pid}, "
        f"in {time.monotonic() - began:.1f} s{left}\n"
    )
    return OK


def log_level(args: argparse.Namespace, env: Env) -> int:
    """Print what the daemon logs, after setting it where LEVEL is given."""
    client = Client(args.admin_socket)
    if args.level is None:
        now = client.get("/v1/log-level", LogLevelView)
    else:
        now = client.send("PUT", "/v1/log-level", LogLevelView, body=LogLevelView(level=args.level))
    env.stdout.write(now.level + "\n")
    return OK


def version(args: argparse.Namespace, env: Env) -> int:
    """Print the version of this command; with --daemon that of the running daemon too."""
    own = {"version": __version__, "python": platform.python_version()}
    running = Client(args.admin_socket).get("/v1/version", VersionView) if args.daemon else None
    if args.output == "json":
        env.stdout.write(json_text({**own, "daemon": running} if running else own))
        return OK
    env.stdout.write(f"proxyd {__version__}\n")
    if running:
        env.stdout.write(f"daemon {running.version}  pid {running.pid}\n")
    return OK
