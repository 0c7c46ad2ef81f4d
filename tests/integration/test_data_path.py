"""Bytes through the proxy: balance, volume, half-close, resets, back-pressure, many connections."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.clients import ask, connect, many, new_key, read_all, read_line
from tests.support.daemon import Proxyd, resident_kib
from tests.support.manifests import endpoints, service, write
from tests.support.netlab import CLIENT_POD_IP, POD_PORT, Lab, pod_ip
from tests.support.pod_servers import RESET_ON_CLOSE, read_digest, stream, stream_digest
from tests.support.waiting import DEADLINE, wait_for

VIP = "10.96.0.10"
GIB = 1 << 30
MIB = 1 << 20

Run = Callable[..., Proxyd]


def serve(manifests: Path, proxyd: Run, *pods: int, workers: int = 1) -> Proxyd:
    """A daemon with one Service at VIP:80 with these pods behind it, serving."""
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", *pods))
    daemon = proxyd(workers=workers)
    daemon.wait_listener(VIP, 80)
    return daemon


def test_one_worker_is_exactly_round_robin(lab: Lab, manifests: Path, proxyd: Run) -> None:
    serve(manifests, proxyd, 1, 2, 3)
    names = [ask(lab.client, VIP, 80) for _ in range(30)]
    assert set(names[:3]) == {"pod-1", "pod-2", "pod-3"}
    assert names == list(itertools.islice(itertools.cycle(names[:3]), 30))


def test_two_workers_are_even(lab: Lab, manifests: Path, proxyd: Run) -> None:
    serve(manifests, proxyd, 1, 2, 3, workers=2)
    outcome = many(lab.client, VIP, 80, 300)
    assert outcome.total == 300
    assert all(abs(outcome.answered[f"pod-{i}"] - 100) <= 2 for i in (1, 2, 3)), outcome.answered


def test_control_can_relay_itself(lab: Lab, manifests: Path, proxyd: Run) -> None:
    daemon = serve(manifests, proxyd, 1, 2, 3, workers=0)
    assert daemon.worker_pids() == []
    outcome = many(lab.client, VIP, 80, 30)
    assert outcome.answered == {"pod-1": 10, "pod-2": 10, "pod-3": 10}


def test_a_gibibyte_each_way_at_once(lab: Lab, manifests: Path, proxyd: Run) -> None:
    serve(manifests, proxyd, 1)
    with connect(lab.client, VIP, 80, timeout=DEADLINE) as sock:

        def send() -> None:
            for block in stream(2, GIB):
                sock.sendall(block)
            sock.shutdown(socket.SHUT_WR)

        begin = time.monotonic()
        sock.sendall(f"duplex {GIB} 1\n".encode())
        sending = threading.Thread(target=send)
        sending.start()
        came = read_digest(sock, limit=GIB)
        sending.join()
        seen_by_pod = read_all(sock).decode()
        print(f"1 GiB each way: {time.monotonic() - begin:.2f} s")
    assert came == (GIB, stream_digest(1, GIB))
    assert seen_by_pod == stream_digest(2, GIB)


@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_the_client_ends_first_and_gets_a_late_answer(
    lab: Lab, manifests: Path, proxyd: Run, pause: float
) -> None:
    serve(manifests, proxyd, 1)
    with connect(lab.client, VIP, 80) as sock:
        # Without a pause, request and end come before the endpoint is connected.
        sock.sendall(b"late 0.5\n" + b"".join(stream(3, 100_000)))
        time.sleep(pause)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).decode() == stream_digest(3, 100_000)


def test_the_endpoint_ends_first_and_gets_late_data(lab: Lab, manifests: Path, proxyd: Run) -> None:
    serve(manifests, proxyd, 1)
    key = new_key()
    with connect(lab.client, VIP, 80) as sock:
        sock.sendall(f"early {key}\n".encode())
        assert read_all(sock) == b"early\n"
        time.sleep(0.5)  # long enough for a relay that closes both sides at the first end
        for block in stream(4, MIB):
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)
        assert ask(lab.node, pod_ip(1), POD_PORT, f"report {key}", 25) == stream_digest(4, MIB)


def test_a_reset_by_the_endpoint_is_passed_on(lab: Lab, manifests: Path, proxyd: Run) -> None:
    serve(manifests, proxyd, 1)
    with connect(lab.client, VIP, 80) as sock:
        sock.sendall(b"reset\n")
        assert read_line(sock) == "ready"
        sock.sendall(b"!")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_a_reset_by_the_client_is_passed_on(lab: Lab, manifests: Path, proxyd: Run) -> None:
    serve(manifests, proxyd, 1)
    key = new_key()
    with connect(lab.client, VIP, 80) as sock:
        sock.sendall(f"watch {key}\n".encode())
        assert read_line(sock) == "ready"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    assert ask(lab.node, pod_ip(1), POD_PORT, f"report {key}", 25) == "reset 0"


def test_an_end_is_not_passed_on_as_a_reset(lab: Lab, manifests: Path, proxyd: Run) -> None:
    serve(manifests, proxyd, 1)
    key = new_key()
    with connect(lab.client, VIP, 80) as sock:
        sock.sendall(f"watch {key}\n".encode())
        assert read_line(sock) == "ready"
        sock.sendall(b"12345")
    assert ask(lab.node, pod_ip(1), POD_PORT, f"report {key}", 25) == "eof 5"


def stands_still(figure: Callable[[], int], still: float = 0.5) -> int:
    """Wait until a figure is more than 0 and has not changed for `still` seconds; the figure."""
    last, since = figure(), time.monotonic()

    def settled() -> bool:
        nonlocal last, since
        now = figure()
        if now != last or not now:
            last, since = now, time.monotonic()
        return time.monotonic() - since >= still

    wait_for(settled, "the flow to stand still")
    return last


def test_a_client_that_stops_reading(lab: Lab, manifests: Path, proxyd: Run) -> None:
    size = 256 * MIB
    daemon = serve(manifests, proxyd, 1)
    key = new_key()
    assert many(lab.client, VIP, 80, 20).total == 20  # what the first connections allocate is not counted
    (worker,) = daemon.worker_pids()
    before = resident_kib(worker)
    with connect(lab.client, VIP, 80, timeout=DEADLINE) as sock:
        sock.sendall(f"push {size} 5 {key}\n".encode())
        sent = stands_still(lambda: int(ask(lab.node, pod_ip(1), POD_PORT, f"progress {key}") or 0))
        assert 0 < sent < size // 2
        growth = resident_kib(worker) - before
        print(f"{sent / MIB:.1f} MiB sent into a stopped reader; the worker grew by {growth} KiB")
        assert growth < 4096
        assert ask(lab.client, VIP, 80) == "pod-1"  # nobody else is held up
        assert read_digest(sock) == (size, stream_digest(5, size))


def test_an_endpoint_that_stops_reading(lab: Lab, manifests: Path, proxyd: Run) -> None:
    size = 256 * MIB
    daemon = serve(manifests, proxyd, 1)
    key = new_key()
    assert many(lab.client, VIP, 80, 20).total == 20
    (worker,) = daemon.worker_pids()
    before = resident_kib(worker)
    sent = 0
    with connect(lab.client, VIP, 80, timeout=DEADLINE) as sock:
        sock.sendall(f"stall {key}\n".encode())
        assert read_line(sock) == "ready"

        def send() -> None:
            nonlocal sent
            for block in stream(6, size):
                sock.sendall(block)
                sent += len(block)
            sock.shutdown(socket.SHUT_WR)

        sending = threading.Thread(target=send)
        sending.start()
        try:
            assert 0 < stands_still(lambda: sent) < size // 2
            growth = resident_kib(worker) - before
            print(f"{sent / MIB:.1f} MiB sent into a stopped reader; the worker grew by {growth} KiB")
            assert growth < 4096
            assert ask(lab.client, VIP, 80) == "pod-1"
        finally:
            assert ask(lab.node, pod_ip(1), POD_PORT, f"resume {key}") == "resumed"
            sending.join()
        assert read_all(sock).decode() == f"{size} {stream_digest(6, size)}"


def test_two_thousand_idle_connections(lab: Lab, manifests: Path, proxyd: Run) -> None:
    count = 2000
    daemon = serve(manifests, proxyd, 1, 2, 3)
    (worker,) = daemon.worker_pids()
    before = resident_kib(worker)
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(lab.client, VIP, 80)) for _ in range(count)]
        for number, sock in enumerate(idle):
            sock.sendall(b"echo\nhello %d\n" % number)
        for number, sock in enumerate(idle):
            assert read_line(sock) == f"hello {number}"
        print(f"{count} connections: the worker grew by {resident_kib(worker) - before} KiB")
        # All are open at once; each still works, in another order, while new ones come and go.
        assert many(lab.client, VIP, 80, 30).total == 30
        for number, sock in reversed(list(enumerate(idle))):
            sock.sendall(b"again %d\n" % number)
        for number, sock in enumerate(idle):
            assert read_line(sock) == f"again {number}"


def test_both_sides_of_a_connection_are_kept_alive(lab: Lab, manifests: Path, proxyd: Run) -> None:
    serve(manifests, proxyd, 1)
    with connect(lab.client, VIP, 80) as sock:
        sock.sendall(b"echo\nhello\n")
        assert read_line(sock) == "hello"

        def peers_with_keepalive() -> set[str]:
            lines = lab.node.run("ss", "-Htno", "state", "established").splitlines()
            return {line.split()[3].rpartition(":")[0] for line in lines if "timer:(keepalive," in line}

        # The endpoint's side gets it only when the connection has lasted some seconds.
        wait_for(lambda: peers_with_keepalive() == {CLIENT_POD_IP, pod_ip(1)}, "keepalive on both sides")
