"""A service manager, as far as a service talks to it: sd_notify(3)."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from pathlib import Path
from typing import Self

from tests.support.waiting import NotInTime, wait_for


class Manager:
    """A service manager's socket, and what came."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "notify")
        self.seen: list[tuple[float, dict[str, str]]] = []
        self.stored: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        Path(self.path).chmod(0o666)
        self._socket.setblocking(False)

    def read(self) -> list[dict[str, str]]:
        """Everything that came so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                lines = self._socket.recv(65536).decode().splitlines()
                message = dict(line.split("=", 1) for line in lines)
                if {"FDSTORE", "FDSTOREREMOVE"} & message.keys():
                    self.stored.append(message)  # what is kept for the next start
                else:
                    self.seen.append((time.monotonic(), message))
        return [message for _, message in self.seen]

    def wait(self, name: str, value: str, count: int = 1) -> dict[str, str]:
        """Wait for the message in which a variable has a value, for the count-th time."""

        def came() -> dict[str, str] | None:
            found = [message for message in self.read() if re.fullmatch(value, message.get(name, ""))]
            return found[count - 1] if len(found) >= count else None

        try:
            return wait_for(came, f"{name}={value}")
        except NotInTime as error:
            error.add_note(f"came: {self.seen}")
            raise

    def fed(self) -> int:
        """How often the watchdog was fed."""
        return sum("WATCHDOG" in message for message in self.read())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
