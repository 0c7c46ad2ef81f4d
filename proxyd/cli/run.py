"""`proxyd run`, and kube-proxy's command line: settings from flags, logs, and then the daemon until a signal ends it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

from proxyd.cli.env import INVALID, OK, USAGE, CommandError, Env
from proxyd.cli.pflags import Given
from proxyd.control.admin.picture import Picture
from proxyd.control.admin.unix_socket import AdminError
from proxyd.control.config.file import ConfigError, Configuration, write
from proxyd.control.config.flags import FLAGS
from proxyd.control.config.kube_flags import WINNING, judge, setting_warnings, void_beside_a_file
from proxyd.control.config.options import StartError
from proxyd.control.config.settings import Settings, SettingsError, Surroundings, build
from proxyd.control.runtime import logs


def run(args: argparse.Namespace, env: Env) -> int:
    """Serve, or carry out the order that is given instead: --cleanup, --write-config-to, --init-only.

    Args:
        args: `given`, the flags, and `program`, the name that this was called by. By the name kube-proxy --config makes
            most of kube-proxy's flags void, as it does there; else flags win over the file.
        env: streams and environment.
    """
    flags: Given = args.given
    like_kube_proxy = args.program == "kube-proxy"
    errors, warnings = judge(flags.foreign)
    if errors:
        raise CommandError(*errors, code=USAGE)
    winning = WINNING if like_kube_proxy else None
    surroundings = Surroundings.here(env.environ)
    configuration = Configuration(flags.settings, surroundings, winning=winning)
    if flags.ordered("cleanup"):
        return _cleanup(configuration, env)
    try:
        settings, told = configuration.load()
    except SettingsError as error:
        code = INVALID if isinstance(error, ConfigError) else USAGE
        raise CommandError(*error.problems, code=code) from None
    void = void_beside_a_file(flags.settings) if like_kube_proxy else []
    if void:
        names = ", ".join(f"--{name}" for name in void)
        warnings.append(f"--config is given: kube-proxy ignores {names} beside it, and so does this")
    in_force = {f: text for f, text in flags.settings.items() if f.replace("_", "-") not in void}
    for line in (*warnings, *setting_warnings(in_force)):
        env.say(f"warning: {line}")
    for warning in told:
        env.say(str(warning))
    configuration.told = tuple(map(str, told))
    if path := flags.orders.get("write-config-to"):
        return _write(settings, path, env)
    missing = [path for path in settings.manifests if not os.path.lexists(path)]
    if missing:
        raise CommandError(
            *(f"--manifests: {path}: no such file or folder" for path in missing), code=INVALID
        )
    if flags.ordered("init-only"):
        return _initialise(settings, env)
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
    _configure_logs(settings, env)
    from proxyd.control.daemon import run as run_daemon  # noqa: PLC0415 - a wrong flag need not wait for it

    try:
        return run_daemon(settings, on_serving, configuration)
    except StartError as error:
        raise CommandError(str(error), code=error.code) from None
    except AdminError as error:
        raise CommandError(str(error)) from None


def _configure_logs(settings: Settings, env: Env) -> None:
    try:
        logs.configure(
            settings.log_format,
            settings.verbosity,
            stream=env.stderr,
            environ=env.environ,
            rooms=settings.vmodule,
            path=settings.log_file,
        )
    except OSError as error:
        raise CommandError(f"--log-file: {settings.log_file}: {error.strerror}", code=USAGE) from None


def _cleanup(configuration: Configuration, env: Env) -> int:
    """What `kube-proxy --cleanup` does here: proxyd's own state, and the userspace mode's chains."""
    from proxyd.cli.cleanup import cleanup  # noqa: PLC0415 - a daemon does not need it

    socket = configuration.admin_socket()
    return cleanup(argparse.Namespace(admin_socket=socket, dry_run=False, kube_proxy=True), env)


def _write(settings: Settings, path: str, env: Env) -> int:
    try:
        write(settings, path)
    except OSError as error:
        raise CommandError(f"--write-config-to: {path}: {error.strerror}") from None
    env.say(f"wrote the configuration to {path}")
    return OK


def _initialise(settings: Settings, env: Env) -> int:
    """What needs more rights than serving does: kube-proxy's chains are removed, and that is all."""
    _configure_logs(settings, env)
    from proxyd.control.kube.migration import look  # noqa: PLC0415 - as above

    look(settings).report()
    return OK
