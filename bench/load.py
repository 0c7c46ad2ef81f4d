"""HTTP load that wrk cannot make, as a program of its own. Every answer is compared, byte for byte, with the right one.

    python bench/load.py paced IP:PORT[,IP:PORT...] --rate N --seconds S [--kept N]
    python bench/load.py idle IP:PORT --connections N

`paced` asks at fixed moments, whatever became of earlier questions, and takes the time from that moment to the last byte:
a stall is seen by every request that it delayed. `--kept N` asks on N open connections, without it each request has a
connection of its own. `idle` opens connections, asks once on each and keeps them until the next line on standard input;
then it asks once more on each.

Each writes "ready" when it is prepared, begins (or ends) at a line on standard input, and ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import gc
import json
import select
import socket
import sys
import time

Address = tuple[str, int]
KEPT = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
CLOSE = b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"
BODY_BYTES = 1000
GIVE_UP = 5.0  # seconds that a request may take
_IN, _OUT, _ET = select.EPOLLIN, select.EPOLLOUT, select.EPOLLET
_TIMERSLACK = 29  # PR_SET_TIMERSLACK


def is_right(answer: bytes) -> bool:
    """Whether a complete answer is that of a pod (bench/pods.py)."""
    head, _, text = answer.partition(b"\r\n\r\n")
    return (
        head.startswith(b"HTTP/1.1 200 ")
        and len(text) == BODY_BYTES
        and text[:4] == b"pod-"
        and text[5:] == b"." * (BODY_BYTES - 5)
    )


class Request:
    """One connection and what it waits for."""

    __slots__ = ("answer", "asked", "due", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.answer = b""
        self.due = 0.0  # the moment that was planned; 0: none under way
        self.asked = False


class Load:
    """Requests to some addresses in turns."""

    def __init__(self, addresses: list[Address]) -> None:
        self._addresses = addresses
        self._epoll = select.epoll()
        self.open: dict[int, Request] = {}
        self.free: collections.deque[Request] = collections.deque()
        self.times: list[float] = []
        self.errors: collections.Counter[str] = collections.Counter()
        self.late = 0.0  # the longest that a request was sent after its moment
        self._turn = 0

    def connect(self) -> Request:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._turn += 1
        sock.connect_ex(self._addresses[self._turn % len(self._addresses)])
        made = self.open[sock.fileno()] = Request(sock)
        self._epoll.register(sock.fileno(), _IN | _OUT | _ET)
        return made

    def poll(self, until: float) -> list[Request]:
        """Wait for events, at most until a moment; the connections that had one."""
        wait = until - time.monotonic()
        if wait > 0:  # epoll waits for whole milliseconds, select for less
            select.select([self._epoll], [], [], wait)
        return [self.open[fd] for fd, _ in self._epoll.poll(0, 512) if fd in self.open]

    def drop(self, request: Request, error: str = "") -> None:
        """Close a connection; where its request was under way that is an error."""
        if error:
            self.errors[error] += 1
        del self.open[request.sock.fileno()]
        request.sock.close()

    def read(self, request: Request) -> bool:
        """Take all that is there, as one event may stand for an answer and the end; False where the connection ended."""
        try:
            while part := request.sock.recv(65536):
                request.answer += part
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def done(self, request: Request) -> None:
        """An answer is complete."""
        if is_right(request.answer):
            self.times.append(time.monotonic() - request.due)
        else:
            self.errors["wrong answer"] += 1
        request.answer = b""
        request.due = 0.0

    # Each request on a connection of its own

    def lonely(self, request: Request) -> None:
        """An event of a connection that carries one request."""
        if not request.asked:
            problem = request.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if problem:
                self.drop(request, f"connect: {errno_name(problem)}")
                return
            try:
                request.sock.send(CLOSE)
            except BlockingIOError:  # still connecting
                return
            except OSError as error:
                self.drop(request, f"send: {errno_name(error.errno or 0)}")
                return
            request.asked = True
        elif not self.read(request):
            self.done(request)
            self.drop(request)

    # Kept connections

    def send(self, request: Request, due: float) -> None:
        request.due = due
        try:
            request.sock.send(KEPT)
        except OSError as error:
            self.drop(request, f"send: {errno_name(error.errno or 0)}")

    def kept(self, request: Request) -> None:
        """An event of a connection that goes on."""
        if not self.read(request):
            self.drop(request, "connection lost")
        elif request.due and len(request.answer) - request.answer.find(b"\r\n\r\n") - 4 >= BODY_BYTES:
            self.done(request)
            self.free.append(request)

    def prepare(self, count: int) -> None:
        """Open connections, fifty at a time, and ask once on each."""
        waiting = 0
        begun: set[int] = set()
        deadline = time.monotonic() + 60
        while len(self.free) + sum(self.errors.values()) < count and time.monotonic() < deadline:
            while waiting < 50 and len(self.open) + sum(self.errors.values()) < count:
                self.connect()
                waiting += 1
            for request in self.poll(time.monotonic() + 0.1):
                fd = request.sock.fileno()
                if fd not in begun:
                    if request.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                        self.drop(request, "connect")
                        waiting -= 1
                    else:
                        begun.add(fd)
                        self.send(request, time.monotonic())
                    continue
                before = len(self.free) + sum(self.errors.values())
                self.kept(request)
                waiting -= len(self.free) + sum(self.errors.values()) - before
        self.times.clear()

    def ask_all(self) -> None:
        """One more request on each kept connection, fifty at a time."""
        waiting = collections.deque(self.free)
        self.free.clear()
        goal = len(waiting)
        deadline = time.monotonic() + 60
        while len(self.free) + sum(self.errors.values()) < goal and time.monotonic() < deadline:
            while waiting and goal - len(waiting) - len(self.free) < 50:
                self.send(waiting.popleft(), time.monotonic())
            for request in self.poll(time.monotonic() + 0.1):
                self.kept(request)

    def paced(self, rate: float, seconds: float, *, kept: bool) -> None:
        """Requests at fixed moments."""
        handle = self.kept if kept else self.lonely
        begin = time.monotonic() + 0.01
        total, number = int(rate * seconds), 0
        while number < total or any(request.due for request in self.open.values()):
            due = begin + number / rate
            now = time.monotonic()
            if number == total and now > begin + seconds + GIVE_UP:
                break
            while number < total and due <= now and (self.free or not kept):
                self.late = max(self.late, now - due)
                if kept:
                    self.send(self.free.popleft(), due)
                else:
                    self.connect().due = due
                number += 1
                due = begin + number / rate
            for request in self.poll(due if number < total and (self.free or not kept) else now + 0.05):
                handle(request)
        for request in list(self.open.values()):
            if request.due:
                self.drop(request, "no answer")

    def result(self) -> dict[str, object]:
        times = sorted(self.times)

        def at(share: float) -> float:
            return times[min(len(times) - 1, int(len(times) * share))] * 1e6 if times else float("nan")

        return {
            "answers": len(times),
            "errors": dict(self.errors),
            "p50_us": at(0.5),
            "p99_us": at(0.99),
            "max_us": at(1),
            "late_us": self.late * 1e6,
        }

    def close(self) -> None:
        for request in list(self.open.values()):
            self.drop(request)
        self._epoll.close()


def errno_name(number: int) -> str:
    import errno  # noqa: PLC0415

    return errno.errorcode.get(number, str(number))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=["paced", "idle"])
    parser.add_argument("addresses")
    parser.add_argument("--rate", type=float, default=1000)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--kept", type=int, default=0)
    parser.add_argument("--connections", type=int, default=100)
    args = parser.parse_args()
    words = (word.rsplit(":", 1) for word in args.addresses.split(","))
    load = Load([(host, int(port)) for host, port in words])
    ctypes.CDLL(None).prctl(_TIMERSLACK, 1000, 0, 0, 0)
    gc.disable()
    load.prepare(args.connections if args.mode == "idle" else args.kept)
    print("ready", flush=True)
    sys.stdin.readline()
    if args.mode == "idle":
        load.ask_all()
    else:
        load.paced(args.rate, args.seconds, kept=bool(args.kept))
    print(json.dumps(load.result()), flush=True)
    load.close()


if __name__ == "__main__":
    main()
