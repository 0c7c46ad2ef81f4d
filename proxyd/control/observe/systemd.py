"""sd_notify(3): tells the service manager how the daemon is doing; does nothing if there is no manager."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Mapping
from typing import Self

_MAX_STATUS = 300  # characters
_FIRST_STORED = 3  # SD_LISTEN_FDS_START


class Notifier:
    """Sends states to the service manager. No method blocks or raises.

    If the manager has no room for a datagram, the newest state and status text go with the next one.

    Args:
        address: of the manager's datagram socket: a path, or an abstract name with `@`; "" for no manager.
        watchdog_seconds: the longest time between two signs of life; 0 if the manager does not watch.
    """

    def __init__(self, address: str = "", watchdog_seconds: float = 0.0) -> None:
        self.watchdog_seconds = watchdog_seconds
        self._address = ""
        self._socket: socket.socket | None = None
        self._state = ""  # READY, RELOADING or STOPPING that could not be sent yet
        self._text = ""  # the newest status text
        self._said = ""  # the status text that was sent last
        if address[:1] not in {"/", "@"} or "\0" in address:
            return  # no address, or one that no local process has, such as vsock:
        self._address = f"\0{address[1:]}" if address[0] == "@" else address
        with contextlib.suppress(OSError):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    @classmethod
    def here(cls, environ: Mapping[str, str] | None = None) -> Self:
        """For this process, from NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID.

        A watchdog that is meant for another process does not count: sd_watchdog_enabled(3).
        """
        environ = os.environ if environ is None else environ
        usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        ours = not pid or pid == str(os.getpid())
        watched = ours and usec.isascii() and usec.isdecimal() and len(usec) < 16
        return cls(environ.get("NOTIFY_SOCKET", ""), int(usec) / 1e6 if watched else 0.0)

    def close(self) -> None:
        """Close the socket; nothing is sent any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def listening(self) -> bool:
        """Whether there is a manager to talk to."""
        return self._socket is not None

    def ready(self, text: str) -> None:
        """The start, or a reload, is finished."""
        self._state = "READY=1"
        self.status(text)

    def starting(self, text: str, within: float) -> None:
        """The start goes on, and takes at most `within` more seconds, whatever TimeoutStartSec= is."""
        self._state = f"EXTEND_TIMEOUT_USEC={int(within * 1e6)}"
        self.status(text)

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._state = f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"
        self.status("reloading")

    def stopping(self, text: str, within: float) -> None:
        """The end begins, and takes at most `within` seconds, whatever TimeoutStopSec= is."""
        self._state = f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(within * 1e6)}"
        self.status(text)

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows. Nothing is sent if nothing is new."""
        self._text = " ".join(text.split())[:_MAX_STATUS]
        if self._state or self._text != self._said:
            self._send()

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def store(self, name: str, descriptor: int) -> bool:
        """Have the manager keep a descriptor beyond this process: sd_pid_notify_with_fds(3).

        The next start of the service gets it by that name (`stored`), unless the service has ended before.

        Returns:
            Whether the manager was told.
        """
        if self._socket is None:
            return False
        message = f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0".encode()
        try:
            # Not socket.send_fds, which leaves out the address.
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", descriptor))
            self._socket.sendmsg([message], [rights], socket.MSG_NOSIGNAL, self._address)
        except OSError:
            return False
        return True

    def forget(self, name: str) -> None:
        """Have the manager close what it keeps by a name."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                message = f"FDSTOREREMOVE=1\nFDNAME={name}".encode()
                self._socket.sendto(message, socket.MSG_NOSIGNAL, self._address)

    def retry(self) -> None:
        """Send what could not be sent."""
        if self._state or self._text != self._said:
            self._send()

    def _send(self, more: str = "") -> None:
        if self._socket is None:
            return
        text = f"STATUS={self._text}" if self._text != self._said else ""
        message = "\n".join(line for line in (self._state, text, more) if line)
        try:
            self._socket.sendto(
                message.encode("utf-8", "replace"), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, self._address
            )
        except (OSError, ValueError):
            return  # no room, or the manager is being restarted: `retry` sends it
        self._state, self._said = "", self._text


def stored() -> dict[str, list[int]]:
    """Descriptors by name that the manager has given to this process: sd_listen_fds_with_names(3).

    They are close-on-exec from now on, and the variables that told of them are gone.
    """
    environ = os.environ
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[int]] = {}
    if pid == str(os.getpid()) and count.isdecimal():
        for number in range(int(count)):
            with contextlib.suppress(OSError):
                os.set_inheritable(_FIRST_STORED + number, False)
                found.setdefault(names[number] if number < len(names) else "", []).append(
                    _FIRST_STORED + number
                )
    return found
