"""What the SCTP relays of one worker share: the receive buffer, how large buffers of sockets may be, control messages."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from proxyd.relay.engine.plane import Plane
from proxyd.state.sctpsocket import send_control

# Streams, flags and identifiers whose control message is remembered. Peers use a few; one that makes up
# others for each message must not fill the memory.
MAX_CONTROLS = 4096
# Bytes. What the kernel gives without privileges (net.core.wmem_max) is enough for 256 KiB messages, as it
# doubles that.
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
        self.buffer = max(4 * max_message, MIN_BUFFER)  # asked for in each direction of a socket
        # One byte more shows that a message is too long. Notifications must fit too.
        self.view = memoryview(bytearray(max(max_message + 1, 4096)))
        self.buffers = [self.view]
        self.controls: dict[tuple[int, int, int], Control] = {}
        self.may_force = True  # buffers beyond the system's limit

    def measure(self) -> int:
        """Find out how large buffers may be. Returns the size of the largest message that can be sent."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, self.buffer)
            except PermissionError:
                self.may_force = False
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.buffer)
            return probe.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        return self.max_message

    def shut(self) -> None:
        """Nothing of it runs by itself."""

    def __iter__(self) -> Iterator[object]:
        """Nothing: every SCTP relay is in `Plane.relays`."""
        return iter(())

    def control(self, key: tuple[int, int, int]) -> Control:
        """What makes a message like another: see `message_key`."""
        found = self.controls.get(key)
        if found is None:
            if len(self.controls) >= MAX_CONTROLS:
                self.controls.clear()
            found = self.controls[key] = send_control(key)
        return found


def shared(plane: Plane) -> Shared:
    """That of a worker, made with its first SCTP listener."""
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
