"""What the SCTP relays of one worker share: a receive buffer, sizes of socket buffers, control messages."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from proxyd.relay.engine.plane import Plane
from proxyd.state.sctpsocket import send_control

# Combinations of stream, flags and identifier whose control message is remembered. Peers use a few; one that
# makes up others for each message must not fill the memory.
MAX_CONTROLS = 4096
# Bytes. Without privileges the kernel gives net.core.wmem_max, and doubles it: enough for messages of 256
# KiB.
MIN_BUFFER = 1024 * 1024
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h

Control = list[tuple[int, int, bytes]]


class Shared:
    """What the SCTP relays of one worker share.

    Args:
        max_message: bytes of the largest message that is relayed.
    """

    def __init__(self, max_message: int) -> None:
        self.max_message = max_message
        self.buffer = max(4 * max_message, MIN_BUFFER)  # bytes to ask for, in each direction of a socket
        # The one byte more shows that a message is too long. Notifications must fit too.
        self.view = memoryview(bytearray(max(max_message + 1, 4096)))
        self.buffers = [self.view]
        self.controls: dict[tuple[int, int, int], Control] = {}
        self.may_force = True  # the system's limit of buffers is not ours

    def measure(self) -> int:
        """Find out how large buffers may be.

        Returns:
            The size of the largest message that can be sent.
        """
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, self.buffer)
            except PermissionError:
                self.may_force = False
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.buffer)
            return probe.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        return self.max_message

    def shut(self) -> None:
        """Do nothing: it has no timers."""

    def __iter__(self) -> Iterator[object]:
        """No relays: every SCTP relay is in `Plane.relays`."""
        return iter(())

    def control(self, key: tuple[int, int, int]) -> Control:
        """The control message that makes a message like the one that `message_key` was asked about."""
        found = self.controls.get(key)
        if found is None:
            if len(self.controls) >= MAX_CONTROLS:
                self.controls.clear()
            found = self.controls[key] = send_control(key)
        return found


def shared(plane: Plane) -> Shared:
    """What a worker's SCTP relays share; it is made with the first SCTP listener."""
    found = plane.extensions.get("SCTP")
    if not isinstance(found, Shared):
        found = plane.extensions["SCTP"] = Shared(plane.options.sctp_max_message)
        room = found.measure()
        if room < found.max_message:
            plane.reporter.trouble(
                f"the kernel lets this process send SCTP messages of {room} bytes at most, not "
                f"{found.max_message} (--sctp-max-message): set net.core.wmem_max to {found.max_message // 2}"
            )
    return found
