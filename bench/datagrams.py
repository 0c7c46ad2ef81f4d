"""UDP load and echo, as a program of its own. Every answer is compared with its question.

    python bench/datagrams.py live IP:PORT --rate N --seconds S     N queries a second on 64 flows; 0: as many as go
    python bench/datagrams.py fresh IP:PORT --seconds S             every query from a new port, 64 at a time
    python bench/datagrams.py echo FD...                            answer on sockets that were inherited

A load writes "ready" when its flows are made, begins at a line on standard input, and ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import sys
import time

FLOWS = 64
PADDING = bytes(92)
BUFFER_FORCE = (32, 33)  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
LOST_AFTER = 1.0  # seconds without any answer


def echo(fds: list[int]) -> None:
    """Send every datagram back."""
    epoll = select.epoll()
    sockets = {}
    for fd in fds:
        sockets[fd] = sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        _large_buffers(sock)
        epoll.register(fd, select.EPOLLIN)
    while True:
        for fd, _ in epoll.poll():
            sock = sockets[fd]
            for _ in range(64):
                try:
                    data, peer = sock.recvfrom(2048)
                    sock.sendto(data, peer)
                except BlockingIOError:
                    break
                except OSError:  # an earlier client is gone
                    continue


def _large_buffers(sock: socket.socket) -> None:
    for option in BUFFER_FORCE:
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, 8 << 20)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, (socket.SO_SNDBUF, socket.SO_RCVBUF)[option - 32], 8 << 20)


class Load:
    """Queries to one address, and what became of them."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._epoll = select.epoll()
        self._flows: dict[int, socket.socket] = {}
        self.sent = self.answered = self.wrong = self.refused = 0

    def flow(self) -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        made.connect(self._address)
        self._epoll.register(made.fileno(), select.EPOLLIN)
        self._flows[made.fileno()] = made
        return made

    def send(self, flow: socket.socket) -> None:
        """A query says which one it is and whose."""
        self.sent += 1
        try:
            flow.send(self.sent.to_bytes(4, "big") + flow.fileno().to_bytes(4, "big") + PADDING)
        except (BlockingIOError, ConnectionRefusedError):
            self.refused += 1

    def receive(self, timeout: float) -> list[socket.socket]:
        """Take answers; the flows that got one."""
        got = []
        for fd, _ in self._epoll.poll(timeout, 256):
            flow = self._flows[fd]
            try:
                data = flow.recv(2048)
            except OSError:
                self.refused += 1
                continue
            if len(data) == 100 and int.from_bytes(data[4:8], "big") == fd and data[8:] == PADDING:
                self.answered += 1
            else:
                self.wrong += 1
            got.append(flow)
        return got

    def live(self, rate: float, seconds: float) -> float:
        """Ask on flows that exist; seconds from the first query to the last answer."""
        flows = list(self._flows.values())
        begin = last = time.monotonic()
        end = begin + seconds
        first = self.sent
        if not rate:
            for flow in flows:
                self.send(flow)
        while self.answered + self.wrong < self.sent or (rate and last < end):
            now = time.monotonic()
            if rate and now < end:
                for _ in range(int((now - begin) * rate) - (self.sent - first)):
                    self.send(flows[self.sent % FLOWS])
            got = self.receive(0.001 if rate else 0.2)
            if got:
                last = now
            elif now > end and now - last > LOST_AFTER:
                break
            if not rate and now < end:
                # A lost query would silence its flow; nobody else would ask in its place.
                for flow in got or (flows if now - last > LOST_AFTER else ()):
                    self.send(flow)
        return last - begin

    def fresh(self, seconds: float) -> float:
        """Ask from new ports, FLOWS at a time; seconds until the last answer."""
        begin = time.monotonic()
        while (now := time.monotonic()) < begin + seconds:
            flows = [self.flow() for _ in range(FLOWS)]
            for flow in flows:
                self.send(flow)
            left = FLOWS
            while left and time.monotonic() - now < LOST_AFTER:
                left -= len(self.receive(0.1))
            self.close_flows()
        return time.monotonic() - begin

    def close_flows(self) -> None:
        for flow in self._flows.values():
            flow.close()
        self._flows.clear()


def main() -> None:
    if sys.argv[1] == "echo":
        echo([int(word) for word in sys.argv[2:]])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=["live", "fresh"])
    parser.add_argument("address")
    parser.add_argument("--rate", type=float, default=0)
    parser.add_argument("--seconds", type=float, default=2)
    args = parser.parse_args()
    host, port = args.address.rsplit(":", 1)
    load = Load((host, int(port)))
    if args.mode == "live":
        for _ in range(FLOWS):
            load.send(load.flow())
        while load.answered < load.sent and load.receive(LOST_AFTER):
            pass
    warm = load.sent - load.answered
    load.sent = load.answered = 0
    print("ready", flush=True)
    sys.stdin.readline()
    taken = load.live(args.rate, args.seconds) if args.mode == "live" else load.fresh(args.seconds)
    found = {"sent": load.sent, "answered": load.answered, "wrong": load.wrong, "refused": load.refused}
    print(json.dumps({**found, "seconds": taken, "lost_while_warming": warm}), flush=True)
    load.close_flows()


if __name__ == "__main__":
    main()
