"""`proxyd run`: settings from flags, logs, and then the daemon until a signal ends it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

from proxyd.cli.env import INVALID, USAGE, CommandError, Env
from proxyd.control import logs
from proxyd.control.adminsocket import AdminError
from proxyd.control.configfile import ConfigError, Configuration
from proxyd.control.flags import FLAGS
from proxyd.control.settings import Settings, SettingsError, Surroundings, build
from proxyd.control.views import Picture


def run(args: argparse.Namespace, env: Env) -> int:
    """`proxyd run --manifests PATH ...`."""
    configuration = Configuration(given(args), Surroundings.here(env.environ))
    try:
        settings, warnings = configuration.load()
    except SettingsError as error:
        code = INVALID if isinstance(error, ConfigError) else USAGE
        raise CommandError(*error.problems, code=code) from None
    missing = [path for path in settings.manifests if not os.path.lexists(path)]
    if missing:
        raise CommandError(
            *(f"--manifests: {path}: no such file or folder" for path in missing), code=INVALID
        )
    for warning in warnings:
        env.say(str(warning))
    return serve(settings, env, configuration=configuration)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings among the arguments, as texts by field name."""
    return {flag.field: getattr(args, flag.field, None) for flag in FLAGS}


def settings_of(values: Mapping[str, Any], env: Env) -> Settings:
    """Checked settings.

    Raises:
        CommandError: with a line for each flag that is wrong.
    """
    try:
        return build(values, Surroundings.here(env.environ))
    except SettingsError as error:
        raise CommandError(*error.problems, code=USAGE) from None


def serve(
    settings: Settings,
    env: Env,
    on_serving: Callable[[Picture], None] | None = None,
    configuration: Configuration | None = None,
) -> int:
    """Run the daemon in the foreground. Returns its exit code.

    Raises:
        CommandError: it cannot start.
    """
    logs.configure(settings.log_format, settings.verbosity, stream=env.stderr, environ=env.environ)
    from proxyd.control.daemon import StartError  # noqa: PLC0415 - a wrong flag need not wait for it
    from proxyd.control.daemon import run as run_daemon  # noqa: PLC0415 - as above

    try:
        return run_daemon(settings, on_serving, configuration)
    except StartError as error:
        raise CommandError(str(error), code=error.code) from None
    except AdminError as error:
        raise CommandError(str(error)) from None
