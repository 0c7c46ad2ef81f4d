"""UDP through one real worker: flows, endpoints that come and go, limits, timeouts."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxyd.relay.ipc import slots as s
from tests.support.udp import UdpServer, balancer, bound, close, echo, listen, named, query, serving
from tests.support.waiting import DEADLINE, wait_for
from tests.support.worker import WorkerDriver, running


@pytest.fixture
def worker() -> Iterator[WorkerDriver]:
    with running() as made:
        yield made


def unused_udp_port() -> int:
    """A port that refuses datagrams for as long as nobody takes it; below the range for outgoing ones."""
    for port in range(25_000 + os.getpid() % 5000, 32_000):
        with contextlib.suppress(OSError), bound(port=port):
            return port
    raise AssertionError("no free port")


def active(worker: WorkerDriver, number: int) -> int:
    return worker.total(number, s.OPENED) - worker.total(number, s.CLOSED)


def test_each_client_has_a_flow_and_flows_go_round(worker: WorkerDriver) -> None:
    with serving(named(b"a"), named(b"b"), named(b"c")) as servers:
        number = balancer(worker, servers)
        front = listen(worker, number)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(front.client()) for _ in range(6)]
            first = [query(client, b"one") for client in clients]
            assert first == [b"a one", b"b one", b"c one"] * 2
            assert [query(client, b"two") for client in clients] == [b"a two", b"b two", b"c two"] * 2
        assert [len(server.peers) for server in servers] == [2, 2, 2]
        assert worker.total(number, s.OPENED) == 6
        for slot, field, count in (
            (number, s.DATAGRAMS_IN, 12),
            (number, s.DATAGRAMS_OUT, 12),
            (number, s.BYTES_IN, 12 * 3),
            (number, s.BYTES_OUT, 12 * 5),
            (1000, s.DATAGRAMS_IN, 4),
        ):
            wait_for(lambda slot=slot, field=field, count=count: worker.total(slot, field) == count)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_every_size_is_whole_in_both_directions(worker: WorkerDriver, host: str) -> None:
    with serving(echo, host=host) as servers:
        front = listen(worker, balancer(worker, servers), host=host)
        with front.client() as client:
            for size in (0, 1, 512, 1472, 1473, 4096, 4097, 65_000, 65_507, 0, 3):
                data = os.urandom(size)
                assert hashlib.sha256(query(client, data)).digest() == hashlib.sha256(data).digest()
        assert [len(data) for data in servers[0].seen[-3:]] == [65_507, 0, 3]


def test_replies_come_from_the_address_that_was_asked(worker: WorkerDriver) -> None:
    with serving(echo) as servers:
        number = balancer(worker, servers)
        fronts = [listen(worker, number, host=f"127.0.0.{i}") for i in range(1, 6)]
        with bound() as client:
            client.settimeout(DEADLINE)
            for front in fronts:
                client.sendto(b"x", front.address)
                assert client.recvfrom(100) == (b"x", front.address)


def test_one_question_may_have_many_answers(worker: WorkerDriver) -> None:
    with serving(lambda _: [b"%d" % i for i in range(100)]) as servers:
        front = listen(worker, balancer(worker, servers))
        with front.client() as client:
            client.send(b"go")
            assert [client.recv(100) for _ in range(100)] == [b"%d" % i for i in range(100)]


def test_a_removed_endpoint_loses_its_flows_at_once(worker: WorkerDriver) -> None:
    with serving(named(b"a"), named(b"b")) as servers:
        number = balancer(worker, servers[:1])
        front = listen(worker, number)
        with front.client() as client:
            for _ in range(5):
                assert query(client) == b"a ?"
            balancer(worker, servers[1:], number=number, first=1001)
            seen = len(servers[0].seen)
            # Never a pause, always the same port.
            for _ in range(20):
                assert query(client) == b"b ?"
            assert len(servers[0].seen) == seen
            assert active(worker, 1000) == 0
            assert active(worker, number) == 1


def test_a_reply_under_way_survives_the_removal(worker: WorkerDriver) -> None:
    asked = threading.Event()
    go = threading.Event()

    def slow(data: bytes) -> list[bytes]:
        asked.set()
        go.wait(DEADLINE)
        return [b"late"]

    with serving(slow, named(b"b")) as servers:
        number = balancer(worker, servers[:1])
        front = listen(worker, number)
        with front.client() as client:
            client.send(b"?")
            assert asked.wait(DEADLINE)
            balancer(worker, servers[1:], number=number, first=1001)
            go.set()
            assert client.recv(100) == b"late"
            assert query(client) == b"b ?"
            wait_for(lambda: active(worker, 1000) == 0)


def test_an_endpoint_that_refuses_is_passed_over(worker: WorkerDriver) -> None:
    dead = unused_udp_port()
    with serving(named(b"a")) as servers:
        number = balancer(worker, [dead, servers[0]])
        front = listen(worker, number)
        for _ in range(10):
            assert front.ask(b"first") == b"a first"  # the client's only datagram is not lost
        assert worker.total(1000, s.FAILED) >= 1
        worker.wait(lambda: any("Connection refused" in text for text in worker.trouble))


def test_no_refusal_takes_the_listener_down(worker: WorkerDriver) -> None:
    dead = unused_udp_port()
    number = balancer(worker, [dead])
    front = listen(worker, number)
    with front.client(0.2) as client:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                query(client)
        client.settimeout(DEADLINE)
        with UdpServer(named(b"a"), port=dead):
            assert query(client, b"!") == b"a !"
    assert worker.total(number, s.FAILED) >= 1


def test_a_conversation_moves_when_its_endpoint_dies(worker: WorkerDriver) -> None:
    with serving(named(b"a")) as alive, UdpServer(named(b"b")) as dying:
        number = balancer(worker, [dying, alive[0]])
        front = listen(worker, number)
        with front.client(DEADLINE) as client:
            assert query(client) == b"b ?"
            assert query(client) == b"b ?"
            dying.close()
            client.settimeout(1)
            with contextlib.suppress(TimeoutError):
                query(client)  # this one meets the refusal
            client.settimeout(DEADLINE)
            assert query(client) == b"a ?"


def test_affinity(worker: WorkerDriver) -> None:
    with serving(named(b"a"), named(b"b"), named(b"c")) as servers:
        front = listen(worker, balancer(worker, servers, affinity=60))
        assert len({front.ask() for _ in range(9)}) == 1


def test_source_ranges(worker: WorkerDriver) -> None:
    with serving(named(b"a")) as servers:
        number = balancer(worker, servers)
        front = listen(worker, number, ranges=["127.0.0.2/32"])
        with front.client(0.3) as client, pytest.raises(TimeoutError):
            query(client)
        wait_for(lambda: worker.total(number, s.REFUSED) == 1)
        assert not servers[0].seen
        with bound("127.0.0.2") as client:
            client.settimeout(DEADLINE)
            client.sendto(b"?", front.address)
            assert client.recv(100) == b"a ?"


def test_a_slow_first_reply_is_waited_for() -> None:
    def slow(_data: bytes) -> list[bytes]:
        time.sleep(5)
        return [b"at last"]

    with running(udp_timeout=0.25) as worker, serving(slow) as servers:
        assert listen(worker, balancer(worker, servers)).ask(timeout=DEADLINE) == b"at last"


@pytest.mark.parametrize("given_by", ["daemon", "service"])
def test_a_timeout_that_was_given_is_that_of_the_first_exchange_too(given_by: str) -> None:
    """A reply later than 10 s arrives, the first of a flow and one after a single exchange."""
    idle = {"idle": 600.0} if given_by == "service" else {}
    with (
        running(udp_timeout=600.0 if given_by == "daemon" else None) as worker,
        serving(lambda _: [], echo) as (silent, answering),
    ):
        unanswered = listen(worker, balancer(worker, [silent], **idle)).client()
        answered = listen(worker, balancer(worker, [answering], first=1001, **idle)).client()
        with unanswered, answered:
            unanswered.send(b"?")
            assert query(answered) == b"?"
            wait_for(lambda: silent.peers and answering.peers)
            time.sleep(11.5)  # the silence itself
            for server in (silent, answering):
                (flow,) = server.peers
                server.socket.sendto(b"late", flow)
            assert unanswered.recv(100) == answered.recv(100) == b"late"


def test_idle_flows_end_and_busy_ones_stay() -> None:
    with running(udp_timeout=3, records=True) as worker, serving(echo, echo) as servers:
        number = balancer(worker, servers[:1])
        front = listen(worker, number)
        other = balancer(
            worker, servers[1:], idle=60, first=1001
        )  # what the Service says goes before the flag
        lasting = listen(worker, other)
        with front.client() as busy:
            assert front.ask(b"once") == lasting.ask(b"once") == b"once"
            end = time.monotonic() + DEADLINE
            assert query(busy) == b"?"
            while active(worker, number) == 2:
                assert time.monotonic() < end
                assert query(busy) == b"?"
                time.sleep(0.1)
            assert query(busy) == b"?"
            assert (active(worker, number), worker.total(number, s.OPENED)) == (1, 2)
            assert active(worker, other) == 1
        wait_for(lambda: active(worker, number) == 0)
        worker.wait(lambda: len(worker.records) == 2)
        once = next(record for record in worker.records if record.bytes_in == 4)
        assert (once.reason, once.bytes_out, once.attempts, once.service) == ("idle", 4, 1, "prod/dns")
        assert once.endpoint == f"127.0.0.1:{servers[0].port}"


def test_a_closed_listener_refuses_and_its_port_is_free(worker: WorkerDriver) -> None:
    with serving(named(b"a")) as servers:
        number = balancer(worker, servers)
        front = listen(worker, number)
        with front.client(DEADLINE) as client:
            for _ in range(3):
                assert query(client) == b"a ?"
                close(worker, front)
                worker.wait(lambda gone=front.number: gone in worker.drained)
                with pytest.raises(ConnectionRefusedError):
                    query(client)
                assert active(worker, number) == 0
                front = listen(worker, number, port=front.address[1])


def test_a_reissued_listener_keeps_its_flows(worker: WorkerDriver) -> None:
    with serving(named(b"a"), named(b"b")) as servers:
        number = balancer(worker, servers)
        front = listen(worker, number)
        with front.client() as client, front.client() as second:
            assert query(client) == b"a ?"
            assert query(second) == b"b ?"
            # As control does it: the same socket under a new number, then the old number is closed.
            pid = os.pidfd_open(worker.pid)
            try:
                fd = _listener_fd(worker, front.address[1])
                sock = _duplicate(pid, fd)
            finally:
                os.close(pid)
            with socket.socket(fileno=sock) as same:
                from proxyd.relay.ipc.messages import CloseListener, ListenerConfig

                config = ListenerConfig(worker.id(), number, "UDP", f"127.0.0.1:{front.address[1]}", [])
                worker.apply(
                    listeners=[config], close=[CloseListener(front.number)], descriptors=[same.fileno()]
                )
            for _ in range(3):
                assert query(client) == b"a ?"
                assert query(second) == b"b ?"
        assert worker.total(number, s.OPENED) == 2


def _listener_fd(worker: WorkerDriver, port: int) -> int:
    """The worker's descriptor of the UDP socket that is bound to a port."""
    lines = [
        line for name in ("udp", "udp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]
    ]
    inode = next(line.split()[9] for line in lines if line.split()[1].endswith(f":{port:04X}"))
    folder = Path(f"/proc/{worker.pid}/fd")
    return next(int(entry.name) for entry in folder.iterdir() if str(entry.readlink()) == f"socket:[{inode}]")


def _duplicate(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2), which Python has not."""
    import ctypes

    made: int = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, fd, 0)
    assert made >= 0, os.strerror(ctypes.get_errno())
    return made


def test_ten_thousand_clients(worker: WorkerDriver) -> None:
    """Each has a socket of its own, and answers find their way."""
    with serving(echo, echo) as servers:
        for server in servers:
            server.socket.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)
        number = balancer(worker, servers)
        front = listen(worker, number)
        limit = min(10_000, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500) // 2)
        with contextlib.ExitStack() as stack:
            clients = []
            for first in range(0, limit, 100):
                more = [stack.enter_context(_from(first + i, front.address)) for i in range(100)]
                for i, client in enumerate(more):
                    client.send(b"%d" % (first + i))
                assert [client.recv(100) for client in more] == [b"%d" % (first + i) for i in range(100)]
                clients += more
            assert worker.total(number, s.OPENED) == len(clients)
            assert worker.total(number, s.DROPPED) == 0


def _from(i: int, address: tuple[str, int]) -> socket.socket:
    """A client on an address of its own: the node's local ports are for the worker."""
    client = bound(f"127.1.{i >> 8}.{i & 255}", 5000)
    client.settimeout(DEADLINE)
    client.connect(address)
    return client


@pytest.mark.parametrize("answered", [False, True])
def test_a_flood_leaves_conversations_alone(answered: bool) -> None:
    """20,000 clients of one packet each, of whom the table holds 200."""

    def answer(data: bytes) -> list[bytes]:
        return [b"b " + data] if answered or data != b"flood" else []

    began = time.monotonic()
    with running(max_relays=200) as worker, serving(named(b"a"), answer) as servers:
        number = balancer(worker, servers[:1])
        front = listen(worker, number)
        flooded = balancer(worker, servers[1:], number=worker.id(), first=1001)
        hole = listen(worker, flooded)
        with front.client() as client, hole.client() as within:
            # Two conversations: at another listener, and at the one that is flooded.
            for _ in range(2):
                assert query(client) == b"a ?"
                assert query(within) == b"b ?"
            port = max(port for _, port in servers[1].peers)
            before = 0
            for i in range(20_000):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                    stranger.bind((f"127.{2 + (i >> 16)}.{i >> 8 & 255}.{i & 255}", 4000))
                    stranger.sendto(b"flood", hole.address)
                if i % 50 == 0:
                    servers[1].peers.clear()
                    assert query(client, b"%d" % i) == b"a %d" % i
                    assert query(within, b"%d" % i) == b"b %d" % i
                    assert ("127.0.0.1", port) in servers[1].peers  # still the same flow
                if i == 2000:
                    before = worker.rss()
            assert worker.total(number, s.OPENED) == 1
            assert worker.total(flooded, s.EVICTED) > 15_000
            assert active(worker, flooded) <= 200
            assert worker.descriptors() < 300
            assert worker.rss() - before < 2 << 20
            worker.wait(lambda: any("as many UDP flows" in text for text in worker.trouble))
            assert worker.trouble_messages <= 2 + (time.monotonic() - began)  # once a second at most


def test_what_came_too_fast_is_counted(worker: WorkerDriver) -> None:
    """Every datagram has either reached the endpoint or is counted as dropped."""
    with serving(lambda _: []) as servers:
        servers[0].socket.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)
        number = balancer(worker, servers)
        front = listen(worker, number)
        with front.client() as client:
            client.send(b"first")
            wait_for(lambda: servers[0].seen)
            os.kill(worker.pid, signal.SIGSTOP)
            for _ in range(20_000):
                client.send(b"more")
            os.kill(worker.pid, signal.SIGCONT)
            wait_for(lambda: worker.total(number, s.DROPPED_OVERRUN))
            wait_for(lambda: len(servers[0].seen) + worker.total(number, s.DROPPED_OVERRUN) == 20_001)
        worker.wait(lambda: any("came faster" in text for text in worker.trouble))


def test_what_is_too_large_for_the_other_side_is_counted(worker: WorkerDriver) -> None:
    """Over IPv6 a datagram may be 20 bytes larger. It harms neither the endpoint's name nor the flow."""
    with serving(lambda data: [data if data != b"large" else bytes(65_520)], host="127.0.0.1") as servers:
        number = balancer(worker, servers)
        front = listen(worker, number, host="::1")
        with front.client() as client, front.client() as other:
            other.send(bytes(65_520))  # the first of its flow
            wait_for(lambda: worker.total(number, s.DROPPED_TO_ENDPOINT) == 1)
            for _ in range(2):
                assert query(client) == b"?"
            client.send(bytes(65_520))
            wait_for(lambda: worker.total(number, s.DROPPED_TO_ENDPOINT) == 2)
            assert query(client) == query(other) == b"?"
        assert worker.total(1000, s.FAILED) == 0


def test_replies_that_are_too_large_are_counted(worker: WorkerDriver) -> None:
    answers = {b"large": bytes(65_520)}
    with serving(lambda data: [answers.get(data, data)], host="::1") as servers:
        number = balancer(worker, servers)
        front = listen(worker, number)
        with front.client() as client:
            for count in (1, 2, 3):
                client.send(b"large")
                wait_for(lambda count=count: worker.total(number, s.DROPPED_TO_CLIENT) == count)
                assert query(client) == b"?"


def test_descriptors_that_run_out() -> None:
    """More flows are wished for than there are descriptors: the oldest go, and nothing stops."""
    with running(max_relays=5000, files=120) as worker, serving(echo) as servers:
        number = balancer(worker, servers)
        front = listen(worker, number)
        with front.client() as client:
            for _ in range(2):
                assert query(client) == b"?"
            with contextlib.ExitStack() as stack:
                for i in range(300):
                    stranger = stack.enter_context(_from(i, front.address))
                    stranger.send(b"hello")
                    if i % 20 == 0:
                        assert query(client) == b"?"
                assert query(client) == b"?"
            # A datagram that finds no descriptor left waits until those that make room for it are closed.
            for _ in range(100):
                assert front.ask(b"new") == b"new"
        assert not worker.total(number, s.DROPPED)
        assert worker.total(number, s.EVICTED) > 0
        worker.wait(lambda: any("Too many open files" in text for text in worker.trouble))


def test_endpoints_change_while_a_client_talks(worker: WorkerDriver) -> None:
    """With each query under way the endpoint is replaced; every query is answered, and the next goes to the new one."""
    with serving(named(b"a"), named(b"b")) as servers:
        number = balancer(worker, servers[:1])
        front = listen(worker, number)
        with front.client() as client:
            for i in range(300):
                client.send(b"%d" % i)
                which = (i + 1) % 2
                balancer(worker, servers[which : which + 1], number=number, first=1000 + which)
                assert client.recv(100).split()[1] == b"%d" % i
                assert query(client) == (b"a ?" if which == 0 else b"b ?")
        wait_for(lambda: active(worker, number) == 1)
        assert worker.total(number, s.FAILED) == 0


def test_a_client_port_that_is_used_again(worker: WorkerDriver) -> None:
    """A new client at an old one's address goes on with its flow, and gets what it asks for."""
    with serving(named(b"a")) as servers:
        number = balancer(worker, servers)
        front = listen(worker, number)
        for i in range(5):
            with bound("127.0.0.9", 4242) as client:
                client.settimeout(DEADLINE)
                client.connect(front.address)
                assert query(client, b"%d" % i) == b"a %d" % i
        assert worker.total(number, s.OPENED) == 1


def test_one_slow_client_holds_up_nobody(worker: WorkerDriver) -> None:
    """A client that reads nothing loses its own replies only."""
    with serving(lambda data: [bytes(8000)] * 100 if data == b"much" else [data]) as servers:
        front = listen(worker, balancer(worker, servers))
        with front.client() as deaf, front.client() as client:
            for _ in range(50):
                deaf.send(b"much")
                assert query(client) == b"?"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_trains(worker: WorkerDriver, host: str) -> None:
    """Bulk that a sender gives the kernel many datagrams at a time: each arrives as it was sent, and in order."""

    def bulk(i: int) -> bytes:
        """31 datagrams of 1,200 bytes, and a shorter one."""
        return b"".join(b"%4d %4d" % (i, part) + bytes(1191) for part in range(31)) + b"%4d   31" % i

    def answer(data: bytes) -> list[bytes]:
        return [data] * 40 if data.startswith(b"again") else [data]

    with serving(answer, host=host) as servers, contextlib.closing(_trains(host)) as endpoint:
        number = balancer(worker, servers)
        front = listen(worker, number, host=host)
        with front.client() as client, front.client() as other:
            client.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)
            for _ in range(2):
                assert query(client) == b"?"
            big = b"again" + bytes(1000)
            client.send(big)
            assert [client.recv(2000) for _ in range(40)] == [big] * 40
            client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1200)
            for i in range(40):
                client.send(bulk(i))
                whole = b"".join(client.recv(2000) for _ in range(32))
                assert whole == bulk(i)
                assert query(other, b"%d" % i) == b"%d" % i
            client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)
            assert query(client, b"single") == b"single"
            assert _receives_trains(worker, front.address[1])
            # From the endpoint, which sends trains of its own.
            balancer(worker, [endpoint.getsockname()[1]], number=number, first=1001, host=host)
            client.send(b"?")
            endpoint.settimeout(DEADLINE)
            _, peer = endpoint.recvfrom(100)
            endpoint.connect(peer)
            for i in range(100):
                endpoint.send(bulk(i))
                assert b"".join(client.recv(2000) for _ in range(32)) == bulk(i)
        assert worker.total(number, s.DROPPED_TO_CLIENT) == worker.total(number, s.DROPPED_TO_ENDPOINT) == 0
        wait_for(lambda: worker.total(number, s.DATAGRAMS_OUT) == 2 + 40 + 40 * 33 + 1 + 100 * 32)


UDP_SEGMENT, UDP_GRO = 103, 104


def _trains(host: str) -> socket.socket:
    """A socket that sends trains of datagrams of 1,200 bytes."""
    sock = bound(host)
    sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1200)
    return sock


def _receives_trains(worker: WorkerDriver, port: int) -> bool:
    """Whether the listener at a port takes many datagrams as one."""
    pid = os.pidfd_open(worker.pid)
    try:
        with socket.socket(fileno=_duplicate(pid, _listener_fd(worker, port))) as same:
            return bool(same.getsockopt(socket.IPPROTO_UDP, UDP_GRO))
    finally:
        os.close(pid)


def test_shutdown_waits_for_a_reply_under_way() -> None:
    asked = threading.Event()
    go = threading.Event()

    def slow(_data: bytes) -> list[bytes]:
        asked.set()
        go.wait(DEADLINE)
        return [b"late"]

    with running() as worker, serving(slow) as servers:
        front = listen(worker, balancer(worker, servers))
        with front.client() as client:
            client.send(b"?")
            assert asked.wait(DEADLINE)
            worker.shutdown(100)
            time.sleep(0.2)
            assert worker.process.poll() is None
            go.set()
            assert client.recv(100) == b"late"
            assert worker.process.wait(DEADLINE) == 0


def test_shutdown_does_not_wait_for_idle_flows() -> None:
    with running() as worker, serving(echo) as servers:
        front = listen(worker, balancer(worker, servers))
        with front.client() as client:
            assert query(client) == b"?"
            worker.shutdown(100)
            assert worker.process.wait(DEADLINE) == 0
