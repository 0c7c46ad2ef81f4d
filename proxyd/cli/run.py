"""`proxyd run`, and kube-proxy's command line: makes settings of the flags, and runs the daemon."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

from proxyd.api.problems import Problem
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
    """Serve, or do what a flag says instead: --cleanup, --write-config-to, --init-only.

    Args:
        args: `given`, the flags, and `program`, the name that the user called. Called kube-proxy, it ignores
            most of kube-proxy's flags beside --config, as that does; else flags win over the file.
        env: streams and environment.

    Raises:
        CommandError: the flags or the configuration are wrong, or the daemon cannot start.
    """
    flags: Given = args.given
    like_kube_proxy = args.program == "kube-proxy"
    errors, warnings = judge(flags.foreign)
    if errors:
        raise CommandError(*errors, code=USAGE)
    winning = WINNING if like_kube_proxy else None
    surroundings = Surroundings.here(env.environ)
    configuration = Configuration(flags.settings, surroundings, winning=winning)
    if flags.wants("cleanup"):
        return _cleanup(configuration, env)
    settings, file_warnings = load(configuration)
    void = void_beside_a_file(flags.settings) if like_kube_proxy else []
    if void:
        names = ", ".join(f"--{name}" for name in void)
        warnings.append(f"--config is given: kube-proxy ignores {names} beside it, and so does this")
    in_force = {f: text for f, text in flags.settings.items() if f.replace("_", "-") not in void}
    for line in (*warnings, *setting_warnings(in_force)):
        env.say(f"warning: {line}")
    for warning in file_warnings:
        env.say(str(warning))
    configuration.told = tuple(map(str, file_warnings))
    if path := flags.actions.get("write-config-to"):
        return _write(settings, path, env)
    missing = [path for path in settings.manifests if not os.path.lexists(path)]
    if missing:
        raise CommandError(
            *(f"--manifests: {path}: no such file or folder" for path in missing), code=INVALID
        )
    if flags.wants("init-only"):
        return _initialise(settings, env)
    return serve(settings, env, configuration=configuration)


def load(configuration: Configuration) -> tuple[Settings, tuple[Problem, ...]]:
    """Checked settings, and what is odd about the configuration file.

    Raises:
        CommandError: with a line for each flag or field that is wrong.
    """
    try:
        return configuration.load()
    except SettingsError as error:
        code = INVALID if isinstance(error, ConfigError) else USAGE
        raise CommandError(*error.problems, code=code) from None


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the flags that are settings, as texts by field; None where a flag is not given."""
    return {flag.field: getattr(args, flag.field, None) for flag in FLAGS}


def checked_settings(values: Mapping[str, Any], env: Env) -> Settings:
    """Checked settings from texts by settings field, without a configuration file.

    Raises:
        CommandError: with a line for each value that is wrong.
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

    Args:
        settings: checked.
        env: streams and environment.
        on_serving: is called once, when every listener is open that can be.
        configuration: what SIGHUP reads again; None: settings alone.

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
    """Remove what a killed proxyd left, and the chains of kube-proxy's userspace mode."""
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
    """Remove kube-proxy's chains, which needs more rights than serving does."""
    _configure_logs(settings, env)
    from proxyd.control.kube.migration import look  # noqa: PLC0415 - as above

    look(settings).report()
    return OK
