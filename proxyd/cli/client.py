"""Asks the daemon: HTTP over its Unix socket, with the standard library alone."""

from __future__ import annotations

import errno
import http.client
import os
import socket
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlencode

import msgspec

from proxyd.cli.env import UNREACHABLE, CommandError
from proxyd.control.adminsocket import AdminError, check_folder

_T = TypeVar("_T")
_TIMEOUT = 10.0
_MAX_BYTES = 256 << 20  # an answer about tens of thousands of services takes a few MiB


class _Connection(http.client.HTTPConnection):
    """HTTP to a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """A client of the admin API.

    Args:
        path: of the admin socket.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def items(self, what: str, kind: type[_T], *, namespace: str = "", name: str = "") -> list[_T]:
        """The items of one kind: `services`, `endpoints` or `listeners`.

        Raises:
            CommandError: as `get`.
        """
        query = urlencode({key: value for key, value in (("namespace", namespace), ("name", name)) if value})
        body = self.get(f"/v1/{what}" + (f"?{query}" if query else ""))
        answer = self.decode(body, dict[str, list[kind]])  # type: ignore[valid-type]  # a type that is an argument
        if "items" not in answer:
            raise self._unreachable(f"cannot read the answer of {self._path}: it has no items")
        return answer["items"]

    def get(self, target: str) -> bytes:
        """The body of an answer.

        Raises:
            CommandError: nobody answers at the socket, or something that is not proxyd.
        """
        connection = _Connection(self._path)
        try:
            check_folder(Path(self._path).parent)
            connection.request("GET", target)
            response = connection.getresponse()
            body = response.read(_MAX_BYTES)
        except AdminError as error:
            raise self._unreachable(str(error)) from None
        except OSError as error:
            raise self._unreachable(self._why(error)) from None
        except http.client.HTTPException:
            raise self._unreachable(f"what listens at {self._path} is not proxyd") from None
        finally:
            connection.close()
        if not response.getheader("Server", "").startswith("proxyd/"):
            raise self._unreachable(f"what listens at {self._path} is not proxyd")
        if response.status != http.client.OK:
            raise self._unreachable(
                f"{self._path} answered {response.status} {response.reason} to GET {target}"
            )
        return body

    def decode(self, body: bytes, kind: type[_T]) -> _T:
        """An answer's body as a value.

        Raises:
            CommandError: the daemon is of a version that says something else.
        """
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError as error:
            raise self._unreachable(
                f"cannot read the answer of {self._path} ({error}); is the daemon of the same version as this command?"
            ) from None

    def _why(self, error: OSError) -> str:
        path = self._path
        if isinstance(error, TimeoutError) or error.errno == errno.EAGAIN:
            return f"the daemon at {path} did not answer within {_TIMEOUT:.0f} s"
        if error.errno == errno.EACCES:
            return f"no permission for {path}; run as {_owner(path)} or a member of the socket's group"
        if error.errno in {errno.ENOENT, errno.ENOTDIR}:
            return f"no daemon at {path}; start it with `proxyd run`, or name its socket with --admin-socket"
        if error.errno in {errno.ECONNREFUSED, errno.ENOTSOCK}:
            return f"no daemon listens at {path} any more; start it with `proxyd run`"
        if error.errno in {errno.ECONNRESET, errno.EPIPE}:
            return f"the daemon at {path} ended during the answer"
        return f"cannot ask {path}: {error.strerror or error}"

    @staticmethod
    def _unreachable(why: str) -> CommandError:
        return CommandError(why, code=UNREACHABLE)


def _owner(path: str) -> str:
    try:
        uid = os.stat(path).st_uid  # noqa: PTH116 - the path is a text everywhere here
    except OSError:
        uid = 0
    return "root" if uid == 0 else f"user {uid}"
