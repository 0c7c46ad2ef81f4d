"""The channel between control and a worker: messages and descriptors over a Unix SOCK_SEQPACKET pair."""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Sequence

import msgspec

from proxyd.relay.ipc.messages import MAX_BYTES, MAX_DESCRIPTORS, FromWorker, ToWorker

Message = ToWorker | FromWorker

_INT_SIZE = array.array("i").itemsize
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h
_UNDER_WAY = 4 << 20
_ANCILLARY = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_SIZE)
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_ENCODER = msgspec.msgpack.Encoder()


def send_much(sock: socket.socket) -> None:
    """Make the send buffer as large as the kernel allows: all messages of a start fit in, so nobody waits."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _UNDER_WAY)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNDER_WAY)


class ChannelError(ValueError):
    """A message that can't be sent or understood. The channel is still usable; its descriptors are closed."""


class Channel:
    """One end of the channel; it never blocks.

    Args:
        sock: one socket of the pair; owned by the channel from now on.
    """

    __slots__ = ("_socket",)

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock

    def fileno(self) -> int:
        """The descriptor, for an event loop; -1 after `close`."""
        return self._socket.fileno()

    def send(self, message: object, descriptors: Sequence[int] = ()) -> bool:
        """Send one message; the receiver gets duplicates of `descriptors`, in this order.

        Returns:
            False when the other end reads too slowly: nothing was sent.

        Raises:
            ChannelError: the message is over MAX_BYTES or MAX_DESCRIPTORS.
            OSError: the other end is gone.
        """
        data = _ENCODER.encode(message)
        if len(data) > MAX_BYTES or len(descriptors) > MAX_DESCRIPTORS:
            raise ChannelError(f"message too large: {len(data)} bytes, {len(descriptors)} descriptors")
        try:
            if descriptors:
                rights = array.array("i", descriptors)
                self._socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            else:
                self._socket.send(data)
        except BlockingIOError:
            return False
        return True

    def receive(self) -> tuple[Message, list[int]] | None:
        """Receive one message and its descriptors, which are close-on-exec; None when none has come.

        There are fewer descriptors than were sent where this process has no room for more.

        Raises:
            ChannelError: what came is no message.
            EOFError: the other end is gone.
        """
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(MAX_BYTES, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError as error:
            raise EOFError(str(error)) from None
        descriptors: list[int] = []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % _INT_SIZE])
                descriptors.extend(numbers)
        if not data:  # no message is empty
            close_all(descriptors)
            raise EOFError("the other end is gone")
        problem = f"over {MAX_BYTES} bytes"
        if not flags & socket.MSG_TRUNC:
            try:
                return _DECODER.decode(data), descriptors
            except msgspec.DecodeError as error:
                problem = str(error)
        close_all(descriptors)
        raise ChannelError(f"unreadable message: {problem}")

    def close(self) -> None:
        """Close this end, which the other end sees. May be called twice."""
        self._socket.close()


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that nobody will use."""
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
