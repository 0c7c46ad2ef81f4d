"""What ports of foreign addresses cost a packet that the node only forwards: µs of CPU, client to pod.

    python -m bench.forwarding [--ports 2000] [--rounds 60]

One thread sends a thousand datagrams at a time, and the kernel forwards each before the call returns, so the thread's CPU
time is the packet's. All ways take turns; shown are the best and the median of the rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import socket
import statistics
import time
from collections.abc import Callable

from bench.net import Lab, become_root, pod_ip
from proxyd.api.service import Protocol
from proxyd.host.netlink import Netlink
from proxyd.host.policy_rules import TABLE, RouteTable
from proxyd.host.port_rules import steer_ports
from proxyd.host.steering import Steering as Steerer
from proxyd.state.spec import ListenerKey, Steering

PACKETS = 1000
PORT = 9


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_char_p), ("len", ctypes.c_size_t))


class Header(ctypes.Structure):
    """Struct msghdr of sendmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.POINTER(Iovec)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class Message(ctypes.Structure):
    """Struct mmsghdr of sendmmsg(2)."""

    _fields_ = (("header", Header), ("len", ctypes.c_uint))


def sender(sock: socket.socket) -> Callable[[], float]:
    """What sends PACKETS datagrams and returns the seconds of CPU that it took."""
    vector = Iovec(b"x" * 100, 100)
    header = Header(iov=ctypes.pointer(vector), iovlen=1)
    messages = (Message * PACKETS)(*(Message(header) for _ in range(PACKETS)))
    send = ctypes.CDLL(None, use_errno=True).sendmmsg

    def run() -> float:
        before = time.thread_time()
        sent = 0
        while sent < PACKETS:
            got = send(sock.fileno(), ctypes.byref(messages[sent]), PACKETS - sent, 0)
            if got < 0:
                raise OSError(ctypes.get_errno(), "sendmmsg")
            sent += got
        return time.thread_time() - before

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ports", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    become_root()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    keys = [ListenerKey(f"198.18.{i >> 8}.{i & 255}", 80, Protocol.TCP) for i in range(options.ports - 1)]
    # Of the address that the datagrams go to another port is steered.
    other = [*keys, ListenerKey(pod_ip(1), 80, Protocol.TCP)]
    keys.append(ListenerKey("198.19.0.1", 80, Protocol.TCP))
    with Lab() as lab:
        steerer = Steerer()

        def steer(wanted: list[ListenerKey]) -> None:
            failed = lab.node.call(steerer.sync, dict.fromkeys(wanted, Steering.LOCAL))
            assert not failed, failed
            assert not steerer.trouble, steerer.trouble

        def rules() -> None:
            steer([])
            with lab.node.call(Netlink) as netlink:
                routes = lab.node.call(RouteTable, netlink, TABLE)
                assert not lab.node.call(steer_ports, netlink, routes, dict.fromkeys(keys, Steering.LOCAL))

        ways: dict[str, Callable[[], None]] = {
            "nothing steered": lambda: steer([]),
            f"{options.ports} ports": lambda: steer(keys),
            f"{options.ports} ports, one of them at the packet's address": lambda: steer(other),
            f"{options.ports} policy rules, as without nft": rules,
        }
        figures: dict[str, list[float]] = {name: [] for name in ways}
        with (
            lab.pods[0].socket(kind=socket.SOCK_DGRAM) as sink,
            lab.client.socket(kind=socket.SOCK_DGRAM) as sock,
        ):
            sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # nearly all of it is dropped there
            sink.bind(("0.0.0.0", PORT))
            sock.connect((pod_ip(1), PORT))
            run = sender(sock)
            for turn in range(options.rounds + 1):
                for name, prepare in ways.items():
                    prepare()
                    run()
                    took = [run() for _ in range(5)]
                    if turn:
                        figures[name] += took
        base = min(figures["nothing steered"])
        print(f"{'':60} best  median   of the best")
        for name, found in figures.items():
            best, median = (value / PACKETS * 1e6 for value in (min(found), statistics.median(found)))
            print(f"{name:58} {best:6.2f}  {median:6.2f}   {min(found) / base:5.2f}")


if __name__ == "__main__":
    main()
