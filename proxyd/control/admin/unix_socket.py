"""The admin socket: which folders it may be in, who listens at it, and how it is opened."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

BACKLOG = 64
_MODE = 0o660


class AdminError(Exception):
    """The admin socket cannot be opened; the text is one line that says why and what to do."""


def check_folder(folder: Path) -> None:
    """Refuse a folder in which another user could put a socket in place of ours.

    Raises:
        AdminError: it is not a folder, or a private folder in /tmp that is another user's or open to others.
    """
    try:
        about = folder.lstat()
    except FileNotFoundError:
        return  # there is no socket that could be taken for ours
    except OSError as error:
        raise AdminError(f"{folder}: {error.strerror}") from None
    if not stat.S_ISDIR(about.st_mode) and not folder.is_dir():
        raise AdminError(f"{folder} is not a folder; name another with --admin-socket")
    private = folder.name.startswith("proxyd-") and folder.parent == Path("/tmp")  # noqa: S108 - checked here
    theirs = stat.S_ISLNK(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077
    if private and theirs:
        raise AdminError(
            f"{folder} is not a private folder of yours; name another with --admin-socket, "
            "or set XDG_RUNTIME_DIR"
        )


def make_folder(folder: Path) -> None:
    """Make the folder of an admin socket if it is missing: for owner and group, in /tmp for the owner alone.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700 if folder.name.startswith("proxyd-") else 0o750, parents=True, exist_ok=True)


def listen(path: str) -> socket.socket:
    """A listening socket at a path, with mode 0660. A socket that a dead daemon left there is replaced.

    Raises:
        AdminError: a live daemon listens there, or the path cannot be used.
    """
    folder = Path(path).parent
    try:
        make_folder(folder)
    except OSError as error:
        raise AdminError(
            f"cannot create {folder}: {error.strerror}; name another place with --admin-socket"
        ) from None
    check_folder(folder)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with _alone(folder):
            _remove_stale(path)
            mask = os.umask(0o777 & ~_MODE)
            try:
                sock.bind(path)
            finally:
                os.umask(mask)
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise AdminError(
            f"cannot listen at {path}: {error.strerror or error}; name another with --admin-socket"
        ) from None
    except AdminError:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep two daemons that start at once from removing each other's socket. Best effort, for a second."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break  # a file system without locks
        yield
    finally:
        os.close(fd)


def _remove_stale(path: str) -> None:
    try:
        about = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(about.st_mode):
        raise AdminError(f"{path} exists and is not a socket; remove it or name another with --admin-socket")
    pid = listening_pid(path)
    if pid is not None:
        who = f"pid {pid}" if pid else "a process outside this pid namespace"
        raise AdminError(
            f"{path} is in use by {who}; stop that one first, "
            "or name another place with --admin-socket and --state-file"
        )
    os.unlink(path)  # noqa: PTH108 - the path is a text everywhere here


def listening_pid(path: str) -> int | None:
    """The pid of the process that listens at a Unix socket; 0 if it is unknown, None if nobody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return 0  # its backlog is full
        except OSError as error:
            if error.errno in {errno.ECONNREFUSED, errno.ENOENT}:
                return None
            raise
        # SO_PEERCRED of a connected client names the process that called listen(): unix(7).
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        return pid
