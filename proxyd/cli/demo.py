"""`proxyd demo`: three backends and a daemon over the demo manifests, in the foreground and without root."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import select
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proxyd.cli.env import CommandError, Env
from proxyd.cli.get import resource_table
from proxyd.cli.run import checked_settings, given_settings, serve
from proxyd.control.admin import views
from proxyd.control.admin.picture import Picture
from proxyd.control.admin.unix_socket import AdminError, check_folder, listening_pid, make_folder
from proxyd.control.config.settings import Surroundings, default_admin_socket
from proxyd.state.spec import ListenerState

_BACKENDS = ("web-1=127.1.0.1:9376", "web-2=127.1.0.2:9376", "web-3=127.1.0.3:9376")
_URL = "http://127.96.0.10:8080/"
_READY_SECONDS = 10
_PREFIX = "proxyd-demo-"


def demo(args: argparse.Namespace, env: Env) -> int:
    """Run the demo until Ctrl-C."""
    with _scratch() as scratch, _backends():
        default = default_admin_socket(Surroundings.here(env.environ))
        socket = args.admin_socket or (default if _usable(default) else f"{scratch}/admin.sock")
        flags = "" if socket == default else f" --admin-socket {socket}"
        values: dict[str, Any] = {
            **given_settings(args),
            "manifests": [str(manifests())],
            # 127.0.0.0/8 and high ports need no root, and change nothing on the node.
            "service_cluster_ip_range": "127.96.0.0/16",
            "vip_mode": "bind",
            "external_ip_mode": "none",
            "nodeport_addresses": ["127.0.0.0/8"],
            "allow_loopback_endpoints": "true",
            "drain_timeout": "0",
            "access_log": "-",
            # Another proxy of this machine may use these ports.
            "healthz_bind_address": "",
            "metrics_bind_address": "",
            "admin_socket": socket,
            "state_file": f"{scratch}/state.json",
        }

        def on_serving(picture: Picture) -> None:
            program = _program(env.environ.get("PATH", ""))
            env.stdout.write(welcome(picture, flags, program, colour=env.colour, width=env.width))
            env.stdout.flush()

        return serve(checked_settings(values, env), env, on_serving)


def welcome(
    picture: Picture,
    flags: str = "",
    program: str = "proxyd",
    *,
    colour: bool = False,
    width: int | None = None,
) -> str:
    """What the demo prints once it serves: the table, what does not work, and what to try.

    Args:
        picture: of the daemon.
        flags: what other commands need to find the daemon, with a space before it.
        program: what to type for this program in a shell.
        colour: whether escape sequences may be used.
        width: columns of the terminal; None where there is none.
    """
    lines = ["", resource_table("services", views.services(picture), colour=colour, width=width)]
    bad = [s for s in picture.statuses if s.state not in {ListenerState.SERVING, ListenerState.NO_ENDPOINTS}]
    lines += [f"not serving: {status.service_port} {status.key}: {status}" for status in bad]
    lines += ["" for _ in bad[:1]]
    lines += [
        f"Try:   curl {_URL}        a few times: the backends take turns",
        f"       {program} get endpoints{flags}        in another terminal",
        "Stop:  Ctrl-C",
        "",
        "Connections, as they end:",
        "",
    ]
    return "\n".join(lines)


def _program(path: str) -> str:
    """What to type for this program: its name where a shell finds it in `path`, else where the file is."""
    own = Path(sys.argv[0])
    if own.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m proxyd"
    if shutil.which(own.name, path=path):
        return own.name
    own = own.absolute()
    if not own.is_relative_to(Path.cwd()):
        return shlex.quote(str(own))
    near = str(own.relative_to(Path.cwd()))
    return shlex.quote(near if "/" in near else f"./{near}")


def manifests() -> Path:
    """The folder of the demo's manifests, in the installed package or in the checkout.

    Raises:
        CommandError: it is in neither.
    """
    here = Path(__file__).parent
    for folder in (here / "demo_manifests", here.parents[1] / "config" / "demo"):
        if folder.is_dir():
            return folder
    raise CommandError("the demo's manifests are missing from this installation; install proxyd again")


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A folder for this demo. Folders that killed demos left are removed: nobody holds their locks."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            about = left.lstat()
            if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid():
                with _locked(left):
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as scratch, _locked(Path(scratch)):
        yield scratch


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises:
        OSError: somebody else holds it, or it is gone.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _backends() -> Iterator[None]:
    """The backends, in a process that ends with this one."""
    command = [sys.executable, "-m", "proxyd.cli.backends", *_BACKENDS]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(  # noqa: S603 - our own interpreter and module
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environ,
        process_group=0,  # Ctrl-C does not reach them: they answer until the daemon has stopped
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            readable, _, _ = select.select([process.stdout], [], [], _READY_SECONDS)
            answer = process.stdout.readline().strip() if readable else "they do not start"
            if answer != "ready":
                why = answer or "they ended at once"
                raise CommandError(f"the demo's backends: {why}; stop what uses that address (another demo?)")
            yield
        finally:
            # It ends when its standard input does.
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
            if process.returncode is None:
                process.kill()


def _usable(path: str) -> bool:
    """Whether an admin socket can be opened at a path, and nobody listens there."""
    folder = Path(path).parent
    try:
        make_folder(folder)
        check_folder(folder)
        return os.access(folder, os.W_OK | os.X_OK) and listening_pid(path) is None
    except (OSError, AdminError):
        return False
