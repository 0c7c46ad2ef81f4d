"""A client of the admin API: HTTP over the daemon's Unix socket, with the standard library alone."""

from __future__ import annotations

import errno
import http.client
import os
import socket
import time
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode

import msgspec

from proxyd.cli.env import FAILED, UNREACHABLE, CommandError
from proxyd.control.admin.schema import NO_SUCH_PATH, Refusal
from proxyd.control.admin.unix_socket import AdminError, check_folder

_T = TypeVar("_T")
_TIMEOUT = 10.0
_MAX_BYTES = 256 << 20  # an answer about 10,000 Services takes a few MiB


class UnreachableError(CommandError):
    """No daemon answers, or something answers that is not proxyd."""

    def __init__(self, why: str) -> None:
        super().__init__(why, code=UNREACHABLE)


class Items(msgspec.Struct, Generic[_T]):
    """A list of the admin API, and the revision that it shows."""

    items: list[_T]
    revision: str = ""


class _Connection(http.client.HTTPConnection):
    """HTTP to a Unix socket."""

    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        deadline = time.monotonic() + (self.timeout or _TIMEOUT)
        while True:
            try:
                self.sock.connect(self._path)
                return
            except BlockingIOError:
                # The backlog is full: unix(7).
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


class Client:
    """A client of the admin API.

    Args:
        path: where the admin socket is.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def items(self, what: str, kind: type[_T], query: Mapping[str, str] | None = None) -> list[_T]:
        """The items of one kind.

        Args:
            what: services, endpoints or listeners.
            kind: the type that each is decoded as.
            query: parameters of the request; empty ones are left out.

        Raises:
            CommandError: as of `get`.
        """
        found = self.changes(what, kind, query or {})
        return found.items if found else []

    def changes(
        self,
        what: str,
        kind: type[_T],
        query: Mapping[str, str],
        *,
        revision: str = "",
        wait: float = 0.0,
    ) -> Items[_T] | None:
        """The items of one kind, as soon as the daemon shows something else than it did at `revision`.

        Args:
            what: services, endpoints or listeners.
            kind: the type that each is decoded as.
            query: parameters of the request.
            revision: of an earlier answer; "" returns at once.
            wait: seconds to wait for a change.

        Returns:
            None where nothing has changed meanwhile.

        Raises:
            CommandError: as of `get`.
        """
        if revision:
            query = {**query, "revision": revision, "wait": f"{wait:g}"}
        body = self.request("GET", with_query(f"/v1/{what}", query), seconds=_TIMEOUT + wait)
        return self.decode(body, Items[kind]) if body else None  # type: ignore[valid-type]  # an argument

    def get(self, path: str, kind: type[_T], query: Mapping[str, str] | None = None) -> _T:
        """What the daemon answers to GET at a path, decoded as `kind`.

        Raises:
            UnreachableError: nobody answers at the socket, or something that is not proxyd.
            CommandError: the daemon refuses, with its reason.
        """
        return self.decode(self.request("GET", with_query(path, query or {})), kind)

    def send(
        self, method: str, path: str, kind: type[_T], query: Mapping[str, str] | None = None, body: Any = None
    ) -> _T:
        """Have the daemon do something. Returns its answer, decoded as `kind`.

        Raises:
            CommandError: as of `get`.
        """
        data = b"" if body is None else msgspec.json.encode(body)
        # Reading thousands of manifests takes a while.
        return self.decode(self.request(method, with_query(path, query or {}), data, seconds=60.0), kind)

    def request(self, method: str, path: str, body: bytes = b"", *, seconds: float = _TIMEOUT) -> bytes:
        """The body of an answer; empty where the status is 304.

        Raises:
            CommandError: as of `get`.
        """
        connection = _Connection(self._path, seconds)
        try:
            check_folder(Path(self._path).parent)
            connection.request(method, path, body or None)
            response = connection.getresponse()
            answer = response.read(_MAX_BYTES)
        except AdminError as error:
            raise UnreachableError(str(error)) from None
        except OSError as error:
            raise UnreachableError(self._why(error, seconds)) from None
        except http.client.HTTPException:
            raise UnreachableError(f"what listens at {self._path} is not proxyd") from None
        finally:
            connection.close()
        if not response.getheader("Server", "").startswith("proxyd/"):
            raise UnreachableError(f"what listens at {self._path} is not proxyd")
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise self._refused(response.status, response.reason, method, path, answer)
        return answer if response.status != HTTPStatus.NOT_MODIFIED else b""

    def decode(self, body: bytes, kind: type[_T]) -> _T:
        """An answer's body, decoded as `kind`.

        Raises:
            UnreachableError: it does not fit, as the daemon is of another version.
        """
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError as error:
            raise UnreachableError(
                f"cannot read the answer of {self._path} ({error}); "
                "is the daemon of the same version as this command?"
            ) from None

    def _refused(self, status: int, reason: str, method: str, path: str, answer: bytes) -> CommandError:
        try:
            refusal = msgspec.json.decode(answer, type=Refusal)
        except msgspec.DecodeError:
            return UnreachableError(f"{self._path} answered {status} {reason} to {method} {path}")
        if refusal.reason == NO_SUCH_PATH:
            asked = path.partition("?")[0]
            return UnreachableError(f"the daemon at {self._path} has no {asked}; it is of another version")
        gone = status == HTTPStatus.SERVICE_UNAVAILABLE
        return CommandError(refusal.error, code=UNREACHABLE if gone else FAILED)

    def _why(self, error: OSError, seconds: float) -> str:
        path = self._path
        if isinstance(error, TimeoutError) or error.errno == errno.EAGAIN:
            return f"the daemon at {path} did not answer within {seconds:.0f} s"
        if error.errno == errno.EACCES:
            owner = _owner(path)
            if owner == os.geteuid():
                return f"no permission for {path}: a folder above it or a security policy is in the way"
            who = f"user {owner}" if owner else "root"
            return f"no permission for {path}; run as {who} or a member of the socket's group"
        if error.errno in {errno.ENOENT, errno.ENOTDIR}:
            return f"no daemon at {path}; start it with `proxyd run`, or name its socket with --admin-socket"
        if error.errno in {errno.ECONNREFUSED, errno.ENOTSOCK}:
            return f"no daemon listens at {path} any more; start it with `proxyd run`"
        if error.errno in {errno.ECONNRESET, errno.EPIPE}:
            return f"the daemon at {path} ended during the answer"
        return f"cannot ask {path}: {error.strerror or error}"


def with_query(path: str, query: Mapping[str, str]) -> str:
    """A path with its parameters, without the empty ones."""
    given = urlencode({key: value for key, value in query.items() if value})
    return f"{path}?{given}" if given else path


def _owner(path: str) -> int:
    """The user that a daemon's socket belongs to; root (0) where that can't be seen."""
    try:
        return os.stat(path).st_uid  # noqa: PTH116 - the path is a text everywhere here
    except OSError:
        return 0
