"""What is told of UDP flows: live and finished ones as records, and how many datagrams came faster than they were read."""

from __future__ import annotations

import socket
import time
from _socket import socket as Socket  # noqa: N812 a class
from time import monotonic
from typing import TYPE_CHECKING

from proxyd.relay.ipc.messages import Connection, LiveConnection
from proxyd.relay.udp.mmsg import ClientKey, client_address

if TYPE_CHECKING:
    from proxyd.relay.udp.flow import Flow

# asm-generic/socket.h, linux/sock_diag.h: nine 32-bit numbers, the last is what the socket has dropped.
_SO_MEMINFO = 55
_MEMINFO_BYTES = 36
_DROPS = 8


def overruns(sock: Socket) -> int:
    """How many datagrams have found no room in the receive buffer of a socket since it was made, modulo 2**32."""
    try:
        figures = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO_BYTES)
    except OSError:  # before Linux 4.12
        return 0
    return memoryview(figures).cast("I")[_DROPS]


def live_record(flow: Flow, now: float) -> LiveConnection:
    """What a flow is and does at this moment."""
    return LiveConnection(
        client=_client(flow.key),
        frontend=flow.listener.address,
        service=flow.balancer.name,
        endpoint=str(flow.endpoint or ""),
        protocol="UDP",
        seconds=now - flow.started,
        bytes_in=flow.bytes_in,
        bytes_out=flow.bytes_out,
        state="answered" if flow.datagrams_out else "unanswered",
    )


def final_record(flow: Flow, reason: str) -> Connection:
    """What a flow was, at its end."""
    return Connection(
        client=_client(flow.key),
        frontend=flow.listener.address,
        service=flow.balancer.name,
        endpoint=str(flow.endpoint or ""),
        attempts=flow.attempts,
        bytes_in=flow.bytes_in,
        bytes_out=flow.bytes_out,
        seconds=monotonic() - flow.started,
        reason=reason,
        finished=time.time(),
        protocol="UDP",
    )


def _client(key: ClientKey) -> str:
    ip, port = client_address(key)
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
