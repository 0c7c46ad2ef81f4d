"""Bulk through a real worker: it goes from socket to socket by pipes, and nothing of it is lost or left behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxyd.relay.engine.pipes import MAX_PIPES, PIPE_BYTES
from proxyd.relay.engine.plane import READ_BYTES
from proxyd.relay.ipc import slots as s
from proxyd.relay.tcp.pump import BULK_BYTES
from tests.support import without_call
from tests.support.pod_servers import read_digest
from tests.support.waiting import DEADLINE, wait_for
from tests.support.worker import (
    MIB,
    Frontend,
    WorkerDriver,
    blocks,
    digest_of,
    echo,
    expect_reset,
    idle,
    read_all,
    reset,
    running,
)

# An event loop's own, for signals and threads.
LOOPS_OWN = 2


def pipes(worker: WorkerDriver) -> int:
    """How many pipes for bulk a worker has: of any other it holds one end, or they are the loop's."""
    ends: Counter[str] = Counter()
    for fd in Path(f"/proc/{worker.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            ends[str(fd.readlink())] += 1
    return sum(name.startswith("pipe:") and count == 2 for name, count in ends.items()) - LOOPS_OWN


@pytest.fixture
def worker() -> Iterator[WorkerDriver]:
    with running(records=True) as one:
        yield one


def push(count: int) -> Callable[[socket.socket], None]:
    """A server that sends so many MiB, and its end; then it waits for the client's."""

    def handle(conn: socket.socket) -> None:
        for block in blocks(1, count):
            conn.sendall(block)
        conn.shutdown(socket.SHUT_WR)
        read_all(conn)

    return handle


def stalled(worker: WorkerDriver, front: Frontend, balancer: int, count: int) -> list[socket.socket]:
    """So many clients with small buffers that read nothing, once nothing moves any more."""
    clients = []
    for _ in range(count):
        client = socket.socket()
        client.settimeout(DEADLINE)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        client.connect(front.address)
        clients.append(client)
    wait_for(lambda: worker.total(balancer, s.OPENED) == count)
    moved = -1
    while moved != (now := worker.total(balancer, s.BYTES_OUT)) or now < count * BULK_BYTES:
        moved = now
        time.sleep(1.2)  # counters of open relays are brought up to date once a second
    return clients


@pytest.mark.parametrize("copied", [False, True], ids=["spliced", "copied"])
def test_both_ways_at_once_with_checksums(copied: bool) -> None:
    with running(tcp_splice=not copied) as worker:
        assert not pipes(worker)
        received: list[tuple[int, str]] = []

        def both(conn: socket.socket) -> None:
            reader = threading.Thread(target=lambda: received.append(read_digest(conn)))
            reader.start()
            for block in blocks(2, 64):
                conn.sendall(block)
            conn.shutdown(socket.SHUT_WR)
            reader.join()

        front = worker.forward(worker.serve(both).port)
        for round_ in range(3):
            with front.connect() as client:
                answer: list[tuple[int, str]] = []
                reader = threading.Thread(
                    target=lambda sock=client, got=answer: got.append(read_digest(sock))
                )
                reader.start()
                for block in blocks(1, 64):
                    client.sendall(block)
                client.shutdown(socket.SHUT_WR)
                reader.join()
            assert answer == [digest_of(2, 64)]
            wait_for(lambda count=round_ + 1: len(received) == count)
        assert set(received) == {digest_of(1, 64)}
        assert 0 < pipes(worker) <= 2 if not copied else not pipes(worker)


def test_stalled_readers_keep_the_pipes_and_others_copy(worker: WorkerDriver) -> None:
    count = MAX_PIPES + 8
    balancer = worker.balancer([worker.serve(push(32)).port])
    front = worker.listener(balancer)
    before = worker.rss()
    clients = stalled(worker, front, balancer, count)
    assert 0 < pipes(worker) <= MAX_PIPES
    assert worker.rss() - before < 6 * MIB
    worker.wait_idle()  # it does not spin meanwhile
    # One that has all its room is not held up by them.
    with front.connect() as free:
        assert read_digest(free) == digest_of(1, 32)
    digests: list[tuple[int, str]] = []
    readers = [threading.Thread(target=lambda c=c: digests.append(read_digest(c))) for c in clients]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert digests == [digest_of(1, 32)] * count
    for client in clients:
        client.close()
    wait_for(lambda: idle(worker, balancer))
    worker.wait(lambda: len(worker.records) == count + 1)
    assert {record.reason for record in worker.records} == {"closed"}
    assert {record.bytes_out for record in worker.records} == {32 * MIB}
    assert pipes(worker) <= MAX_PIPES


def test_pipes_that_were_in_use_when_a_connection_broke_are_replaced(worker: WorkerDriver) -> None:
    balancer = worker.balancer([worker.serve(push(32)).port])
    front = worker.listener(balancer)
    before = worker.descriptors()
    for _ in range(3):  # more than there are pipes, altogether
        for client in stalled(worker, front, balancer, MAX_PIPES // 2):
            reset(client)
        wait_for(lambda: idle(worker, balancer))
        worker.slots.clear(balancer)
    assert worker.descriptors() <= before + 2 * MAX_PIPES
    with front.connect() as client:
        assert read_digest(client) == digest_of(1, 32)
        assert pipes(worker), "there must be one for those that come later"


def test_small_messages_after_bulk_and_bulk_after_small_messages(worker: WorkerDriver) -> None:
    front = worker.forward(worker.serve(echo).port)
    with front.connect() as client:
        for round_ in range(3):
            sender = threading.Thread(target=lambda: [client.sendall(block) for block in blocks(3, 16)])
            sender.start()
            left = 16 * MIB
            while left:
                left -= len(client.recv(min(left, MIB)))
            sender.join()
            for number in range(300):
                text = f"{round_} {number}".encode() * (1 + number % 200)
                client.sendall(text)
                got = b""
                while len(got) < len(text):
                    got += client.recv(1 << 16)
                assert got == text


def test_bulk_of_odd_sizes_is_answered_each_time(worker: WorkerDriver) -> None:
    sizes = [BULK_BYTES + extra for extra in (0, 1, 1447, 1448, 1449, 65_535, PIPE_BYTES - 1, PIPE_BYTES + 1)]
    seen: list[int] = []

    def sink(conn: socket.socket) -> None:
        for size in sizes:
            left = size
            while left:
                left -= len(conn.recv(min(left, MIB)))
            seen.append(size)
            conn.sendall(b".")

    front = worker.forward(worker.serve(sink).port)
    with front.connect() as client:
        for size in sizes:
            client.sendall(bytes(size))
            assert client.recv(1) == b"."
    assert seen == sizes


def test_a_reset_behind_bulk(worker: WorkerDriver) -> None:
    received: list[int] = []

    def then_reset(conn: socket.socket) -> None:
        for block in blocks(1, 8):
            conn.sendall(block)
        conn.recv(1)  # the client has everything
        reset(conn)

    front = worker.forward(worker.serve(then_reset).port)
    with front.connect() as client:
        left = 8 * MIB
        while left:
            left -= len(client.recv(MIB))
        client.sendall(b".")
        expect_reset(client)

    def collect(conn: socket.socket) -> None:
        total = 0
        try:
            while part := conn.recv(MIB):
                total += len(part)
        except ConnectionResetError:
            received.append(total)

    front = worker.forward(worker.serve(collect).port)
    client = front.connect()
    for block in blocks(1, 8):
        client.sendall(block)
    reset(client)
    wait_for(lambda: received)


def test_urgent_data_in_bulk_does_not_stop_the_stream(worker: WorkerDriver) -> None:
    got: list[int] = []

    def collect(conn: socket.socket) -> None:
        total = 0
        while part := conn.recv(MIB):
            total += len(part) - part.count(b"!")
        got.append(total)

    front = worker.forward(worker.serve(collect).port)
    for round_ in range(10):
        with front.connect() as client:
            for _ in range(4):
                client.sendall(bytes(3 * MIB))
                client.send(b"!", socket.MSG_OOB)
                client.sendall(bytes(1000))
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b""
        wait_for(lambda count=round_ + 1: len(got) == count)
    assert set(got) == {4 * (3 * MIB + 1000)}


def test_urgent_data_and_the_end_behind_bulk_do_not_cut_it_short(worker: WorkerDriver) -> None:
    """At urgent data splice(2) gives nothing, and once FIN has come too that looks like the end."""
    got: list[int] = []

    def collect(conn: socket.socket) -> None:
        total = 0
        while part := conn.recv(MIB):
            total += len(part)
        got.append(total)

    front = worker.forward(worker.serve(collect).port)
    for round_ in range(60):
        with front.connect() as client:
            client.sendall(bytes(3 * MIB))
            client.send(b"!", socket.MSG_OOB)
            client.sendall(bytes(100_000))
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b""
        wait_for(lambda count=round_ + 1: len(got) == count)
    assert set(got) == {3 * MIB + 1 + 100_000}


def test_a_worker_that_is_stopped_again_and_again_loses_no_edge(worker: WorkerDriver) -> None:
    """A signal ends splice(2) before the other socket is full: no edge tells of room that was there all the time."""
    front = worker.forward(worker.serve(push(100)).port)
    done = threading.Event()

    def disturb() -> None:
        while not done.wait(0.0003):
            os.kill(worker.pid, signal.SIGSTOP)
            os.kill(worker.pid, signal.SIGCONT)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
            client.settimeout(DEADLINE)
            client.connect(front.address)
            assert read_digest(client) == digest_of(1, 100)
    finally:
        done.set()
        thread.join()


def test_urgent_data_where_one_read_ends_and_another_begins_is_kept(worker: WorkerDriver) -> None:
    got: list[int] = []
    front = worker.forward(worker.serve(lambda conn: got.append(len(read_all(conn)))).port)
    for round_ in range(100):
        with front.connect() as client:
            for _ in range(2):
                client.sendall(bytes(READ_BYTES))
            client.send(b"!", socket.MSG_OOB)
            client.sendall(bytes(1000))
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b""
        wait_for(lambda count=round_ + 1: len(got) == count)
    assert set(got) == {2 * READ_BYTES + 1 + 1000}


@pytest.mark.parametrize("copied", [False, True], ids=["spliced", "copied"])
def test_a_slow_reader_is_not_idle_and_one_that_has_stopped_is(copied: bool) -> None:
    """Between two reads of the relay it takes what the socket's buffer and the pipe hold, some MiB."""
    with running(records=True, tcp_idle_timeout=2, tcp_splice=not copied) as worker:
        front = worker.forward(worker.serve(push(32)).port)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            client.settimeout(DEADLINE)
            client.connect(front.address)
            end = time.monotonic() + 9
            while time.monotonic() < end:
                assert client.recv(4096)
                time.sleep(0.03)
            assert not worker.records
            worker.wait(lambda: [record.reason for record in worker.records] == ["idle"])


def test_few_descriptors_are_few_pipes() -> None:
    with running(files=128) as worker:
        front = worker.forward(worker.serve(push(16)).port)
        digests: list[tuple[int, str]] = []

        def fetch() -> None:
            with front.connect() as client:
                digests.append(read_digest(client))

        fetchers = [threading.Thread(target=fetch) for _ in range(12)]
        for fetcher in fetchers:
            fetcher.start()
        for fetcher in fetchers:
            fetcher.join()
        assert digests == [digest_of(1, 16)] * 12
        assert 0 < pipes(worker) <= 2
        assert not worker.trouble


def test_many_workers_leave_half_of_a_users_pipes_to_others() -> None:
    with running(workers=4) as worker:
        balancer = worker.balancer([worker.serve(push(32)).port])
        front = worker.listener(balancer)
        clients = stalled(worker, front, balancer, 24)
        allowed = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text()) * os.sysconf("SC_PAGE_SIZE")
        assert 0 < 4 * pipes(worker) * PIPE_BYTES <= allowed / 2
        for client in clients:
            reset(client)


def test_a_user_who_may_have_no_more_pipes_gets_bulk_copied(worker: WorkerDriver) -> None:
    """All of a user's pipes count to fs.pipe-user-pages-soft, which a worker has no privilege to exceed."""
    front = worker.forward(worker.serve(push(32)).port)
    allowed = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text()) * os.sysconf("SC_PAGE_SIZE")
    with contextlib.ExitStack() as stack:
        for _ in range(allowed // PIPE_BYTES + 1):
            read_end, write_end = os.pipe()
            stack.callback(os.close, read_end)
            stack.callback(os.close, write_end)
            with contextlib.suppress(PermissionError):
                fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        with front.connect() as client:
            assert read_digest(client) == digest_of(1, 32)
        assert not pipes(worker)

    # They are closed: the next may have one.
    def spliced() -> bool:
        with front.connect() as client:
            assert read_digest(client) == digest_of(1, 32)
        return pipes(worker) > 0

    wait_for(spliced)


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS, errno.EINVAL], ids=errno.errorcode.get)
def test_where_splice_is_not_to_be_had_bulk_is_copied(error: int) -> None:
    with running(
        records=True, before=(sys.executable, without_call.__file__, "splice", str(error))
    ) as worker:
        front = worker.forward(worker.serve(push(32)).port)
        for _ in range(2):
            with front.connect() as client:
                assert read_digest(client) == digest_of(1, 32)
        assert not pipes(worker)
        worker.wait(lambda: [record.reason for record in worker.records] == ["closed"] * 2)
