"""A real worker process, real sockets: what becomes of connections."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import threading
import time
from collections import Counter

import pytest

from proxyd.relay.engine.plane import READ_BYTES
from proxyd.relay.engine.poller import IN, Poller
from proxyd.relay.ipc import slots as s
from proxyd.relay.ipc.channel import Channel
from proxyd.relay.ipc.messages import (
    Acknowledged,
    Apply,
    BalancerConfig,
    CloseListener,
    Drained,
    ListenerConfig,
    Ready,
    Shutdown,
)
from proxyd.relay.ipc.options import Options
from proxyd.relay.worker import Worker
from tests.support.pod_servers import read_digest
from tests.support.waiting import DEADLINE, wait_for
from tests.support.worker import (
    MIB,
    RESET_ON_CLOSE,
    blocks,
    digest_of,
    echo,
    expect_reset,
    idle,
    listen,
    names,
    read_all,
    refusing_port,
    reset,
    running,
)


@pytest.fixture
def worker():
    with running(records=True) as one:
        yield one


# -- balancing --------------------------------------------------------------------------------------------------------


def test_round_robin_is_exact(worker):
    servers = [worker.serve(names(name)) for name in (b"a", b"b", b"c")]
    front = worker.forward(*(server.port for server in servers))
    assert [front.ask() for _ in range(9)] == [b"a", b"b", b"c"] * 3


def test_affinity_keeps_a_client_address_until_its_endpoint_fails(worker):
    servers = [worker.serve(names(name)) for name in (b"a", b"b", b"c")]
    front = worker.forward(*(server.port for server in servers), affinity=600)
    first = {source: front.ask(source) for source in ("127.0.0.1", "127.0.0.2", "127.0.0.3")}
    assert sorted(first.values()) == [b"a", b"b", b"c"]
    for source, name in first.items():
        assert [front.ask(source) for _ in range(4)] == [name] * 4
    lost = first["127.0.0.2"]
    servers[(b"a", b"b", b"c").index(lost)].close()
    moved = front.ask("127.0.0.2")
    assert moved != lost
    assert [front.ask("127.0.0.2") for _ in range(4)] == [moved] * 4


def test_endpoints_change_under_load_and_no_connection_fails(worker):
    servers = [worker.serve(names(name)) for name in (b"a", b"b", b"c")]
    ports = [server.port for server in servers]
    balancer = worker.balancer(ports)
    front = worker.listener(balancer)
    answers: Counter[bytes] = Counter()
    failures: list[BaseException] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                answers[front.ask()] += 1
            except OSError as error:
                failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(150):
        worker.balancer(ports[number % 3 :] + ports[: number % 2], number=balancer)
        time.sleep(0.005)
    wait_for(lambda: len(answers) == 3 or failures)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert set(answers) == {b"a", b"b", b"c"}


def test_an_established_relay_outlives_its_endpoint_and_its_balancer(worker):
    one, two = worker.serve(echo), worker.serve(names(b"two"))
    balancer = worker.balancer([one.port])
    front = worker.listener(balancer)
    with front.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        other = worker.balancer([two.port])
        worker.apply(close=[CloseListener(front.number)], drop_balancers=[balancer])
        assert worker.listener(other).ask() == b"two"
        client.sendall(b"y")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"y"


# -- dialling ---------------------------------------------------------------------------------------------------------


def test_a_refusing_endpoint_is_passed_over(worker):
    alive = worker.serve(names(b"alive"))
    front = worker.forward(refusing_port(), alive.port, refusing_port())
    assert [front.ask() for _ in range(30)] == [b"alive"] * 30
    worker.wait(lambda: len(worker.records) == 30)
    assert {record.endpoint for record in worker.records} == {f"127.0.0.1:{alive.port}"}
    assert max(record.attempts for record in worker.records) > 1
    worker.wait(lambda: any("prod/web: Connection refused" in text for text in worker.trouble))
    assert not any("no answer" in text for text in worker.trouble), "a refusal is not waited for"


@pytest.fixture
def silent_port():
    """A port that never answers a SYN: its backlog is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        try:
            while True:
                filler = socket.socket()
                fillers.append(filler)
                filler.settimeout(0.3)
                try:
                    filler.connect(listener.getsockname())
                except TimeoutError:
                    break
            yield listener.getsockname()[1]
        finally:
            for filler in fillers:
                filler.close()


def test_a_silent_endpoint_delays_only_those_that_tried_it(worker, silent_port):
    alive = worker.serve(names(b"alive"))
    front = worker.forward(silent_port, alive.port)
    times: list[float] = []
    lock = threading.Lock()

    def client() -> None:
        for _ in range(10):
            started = time.monotonic()
            assert front.ask() == b"alive"
            with lock:
                times.append(time.monotonic() - started)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 40
    assert max(times) > 0.24, "some tried it"
    worker.wait(lambda: len(worker.records) == 40)
    attempts = [record.attempts for record in worker.records]
    assert attempts.count(1) >= 20, "whose turn it was to get the live endpoint did not try it"
    assert max(attempts) < 4, "one attempt of 0.25 s, not all of them"


def test_a_lone_silent_endpoint_is_tried_four_times(worker, silent_port):
    front = worker.forward(silent_port)
    started = time.monotonic()
    with pytest.raises(ConnectionResetError):
        front.read()
    assert time.monotonic() - started > 3.7  # 0.25 + 0.5 + 1 + 2
    worker.wait(lambda: worker.records)
    assert (worker.records[0].attempts, worker.records[0].reason) == (4, "no endpoint")


def test_a_client_is_reset_when_no_endpoint_can_be_reached(worker):
    balancer = worker.balancer([refusing_port()])
    front = worker.listener(balancer)
    with pytest.raises(ConnectionResetError):
        front.read()
    wait_for(lambda: idle(worker, balancer))
    assert worker.total(balancer, s.OPENED) == 1
    assert worker.total(balancer, s.FAILED) == 1
    assert worker.total(1000, s.FAILED) == 1
    assert worker.total(1000, s.OPENED) == 0
    worker.wait(lambda: worker.records)
    assert (worker.records[0].reason, worker.records[0].endpoint) == ("no endpoint", "")


def test_a_client_is_reset_when_there_is_no_endpoint_left(worker):
    balancer = worker.balancer([])
    front = worker.listener(balancer)
    with pytest.raises(ConnectionResetError):
        front.read()
    wait_for(lambda: worker.total(balancer, s.REFUSED) == 1)


def test_request_and_end_sent_before_the_endpoint_is_connected(worker, silent_port):
    """The endpoint that answers is dialled a quarter of a second after the client has said everything."""

    def upper(conn: socket.socket) -> None:
        conn.sendall(read_all(conn).upper())

    alive = worker.serve(upper)
    front = worker.forward(silent_port, alive.port)

    def send(client: socket.socket, request: bytes) -> None:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)

    for request in (b"request", b"r" * 3 * MIB):
        with front.connect() as client:
            sender = threading.Thread(target=send, args=(client, request))
            sender.start()
            assert read_all(client) == request.upper()
            sender.join()


def test_a_client_that_leaves_while_dialling_is_let_go(worker, silent_port):
    balancer = worker.balancer([silent_port])
    front = worker.listener(balancer)
    client = front.connect()
    wait_for(lambda: worker.total(1000, s.ATTEMPTS))
    reset(client)
    wait_for(lambda: idle(worker, balancer))
    worker.wait(lambda: worker.records)
    # Else it would have gone on to the last of four attempts, and say "no endpoint".
    assert worker.records[0].reason == "reset by client"
    assert worker.records[0].attempts < 4


def test_source_ranges(worker):
    server = worker.serve(names(b"in"))
    balancer = worker.balancer([server.port])
    front = worker.listener(balancer, ranges=["127.0.0.2/32", "10.0.0.0/8", "fd00::/8"])
    assert front.ask("127.0.0.2") == b"in"
    with pytest.raises(ConnectionResetError):
        front.read("127.0.0.3")
    wait_for(lambda: worker.total(balancer, s.REFUSED) == 1)
    nobody = worker.listener(balancer, ranges=["nonsense"])
    with pytest.raises(ConnectionResetError):
        nobody.read()


def test_ipv6(worker):
    server = worker.serve(names(b"six"))
    front = worker.listener(worker.balancer([server.port]), host="::1")
    assert front.ask() == b"six"
    worker.wait(lambda: worker.records)
    assert worker.records[0].client.startswith("[::1]:")


# -- the byte path ----------------------------------------------------------------------------------------------------


def test_the_client_ends_first_and_the_answer_comes_late(worker):
    gate = threading.Event()

    def late(conn: socket.socket) -> None:
        request = read_all(conn)
        assert gate.wait(DEADLINE)
        conn.sendall(b"late:" + request)

    front = worker.forward(worker.serve(late).port)
    with front.connect() as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(DEADLINE)
        gate.set()
        assert read_all(client) == b"late:question"
    worker.wait(lambda: worker.records)
    assert worker.records[0].reason == "closed"


def test_the_endpoint_ends_first_and_the_client_goes_on(worker):
    got: list[bytes] = []

    def early(conn: socket.socket) -> None:
        conn.sendall(b"early")
        conn.shutdown(socket.SHUT_WR)
        got.append(read_all(conn))

    front = worker.forward(worker.serve(early).port)
    with front.connect() as client:
        assert read_all(client) == b"early"
        client.sendall(b"still ")
        time.sleep(0.1)
        client.sendall(b"here")
        client.shutdown(socket.SHUT_WR)
        wait_for(lambda: got)
    assert got == [b"still here"]
    worker.wait(lambda: worker.records)
    assert worker.records[0].reason == "closed"


def test_a_clients_reset_reaches_the_endpoint(worker):
    seen: list[str] = []

    def watch(conn: socket.socket) -> None:
        try:
            conn.sendall(b"ready")
            read_all(conn)
            seen.append("end")
        except ConnectionResetError:
            seen.append("reset")

    front = worker.forward(worker.serve(watch).port)
    client = front.connect()
    assert client.recv(5) == b"ready"
    reset(client)
    wait_for(lambda: seen)
    assert seen == ["reset"]
    worker.wait(lambda: worker.records)
    assert worker.records[0].reason == "reset by client"


def test_the_answer_of_an_endpoint_that_resets_reaches_the_client(worker):
    """As of a server that refuses a large request: it answers, and ends without having read what came."""
    for length in (1, 1000, 20_000):
        answer = random.Random(length).randbytes(length)

        def refuse(conn: socket.socket, answer: bytes = answer) -> None:
            conn.recv(1)
            # The worker is held, so that the answer and the reset come to it at once.
            os.kill(worker.pid, signal.SIGSTOP)
            try:
                conn.sendall(answer)
                conn.close()  # the rest is unread, which makes it a reset
            finally:
                os.kill(worker.pid, signal.SIGCONT)

        front = worker.forward(worker.serve(refuse).port)
        for _ in range(5):
            with front.connect() as client:
                client.sendall(b"large request")
                got = b""
                with pytest.raises(ConnectionResetError):  # noqa: PT012 - it comes behind the answer
                    while True:
                        got += client.recv(1 << 16)
                assert got == answer


def test_an_endpoints_reset_reaches_the_client_behind_its_data(worker):
    def slam(conn: socket.socket) -> None:
        conn.sendall(b"ready")
        conn.recv(1)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    front = worker.forward(worker.serve(slam).port)
    with front.connect() as client:
        assert client.recv(5) == b"ready"
        client.sendall(b"x")
        expect_reset(client)
    worker.wait(lambda: worker.records)
    assert worker.records[0].reason == "reset by endpoint"


def test_a_reset_after_the_end_still_reaches_the_other_side(worker):
    """The client has ended its half; then it resets. The endpoint must not wait for ever."""
    seen: list[str] = []

    def watch(conn: socket.socket) -> None:
        read_all(conn)
        conn.sendall(b"got the end")
        try:
            for _ in range(1000):
                conn.sendall(b"more")
                time.sleep(0.01)
        except OSError:
            seen.append("gone")

    front = worker.forward(worker.serve(watch).port)
    client = front.connect()
    client.shutdown(socket.SHUT_WR)
    assert client.recv(11) == b"got the end"
    reset(client)
    wait_for(lambda: seen)


def test_a_stalled_reader_stops_the_writer_and_gets_everything_later(worker):
    sent = []

    def push(conn: socket.socket) -> None:
        for block in blocks(1, 64):
            conn.sendall(block)
            sent.append(len(block))

    front = worker.forward(worker.serve(push).port)
    before = worker.rss()
    with front.connect() as client:
        wait_for(lambda: sent)
        last = -1
        while last != len(sent):  # until nothing moves any more
            last = len(sent)
            time.sleep(0.3)
        assert sum(sent) < 60 * MIB, "the writer must feel the reader's stop"
        assert worker.rss() - before < 4 * MIB
        worker.wait_idle()  # it does not spin meanwhile
        assert read_digest(client) == digest_of(1, 64)
    assert worker.rss() - before < 4 * MIB


def test_many_stalled_readers_cost_little_each(worker):
    def push(conn: socket.socket) -> None:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, b"\0" * 16)
        for block in blocks(1, 64):
            conn.sendall(block)

    balancer = worker.balancer([worker.serve(push).port])
    front = worker.listener(balancer)
    before = worker.rss()
    clients = []
    for _ in range(40):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(front.address)
        clients.append(client)
    wait_for(lambda: worker.total(balancer, s.OPENED) == 40)
    moved = -1
    while moved != (now := worker.total(balancer, s.BYTES_OUT)) or not now:
        moved = now
        time.sleep(1.2)  # counters of open relays are brought up to date once a second
    assert worker.rss() - before < 40 * 100 * 1024
    for client in clients:
        client.close()
    wait_for(lambda: idle(worker, balancer))


def test_bulk_both_ways_at_once_with_checksums(worker):
    count = 256
    received = []

    def duplex(conn: socket.socket) -> None:
        sender = threading.Thread(
            target=lambda: (
                [conn.sendall(block) for block in blocks(2, count)],
                conn.shutdown(socket.SHUT_WR),
            )
        )
        sender.start()
        received.append(read_digest(conn))
        sender.join()

    front = worker.forward(worker.serve(duplex).port)
    with front.connect() as client:
        sender = threading.Thread(
            target=lambda: (
                [client.sendall(block) for block in blocks(1, count)],
                client.shutdown(socket.SHUT_WR),
            )
        )
        sender.start()
        assert read_digest(client) == digest_of(2, count)
        sender.join()
    wait_for(lambda: received)
    assert received == [digest_of(1, count)]


def test_small_writes_of_all_sizes_arrive_in_order(worker):
    front = worker.forward(worker.serve(echo).port)
    sizes = random.Random(7)
    data = os.urandom(400_000)
    with front.connect() as client:

        def send() -> None:
            at = 0
            while at < len(data):
                size = sizes.choice((1, 2, 7, 100, 1448, 65536))
                client.sendall(data[at : at + size])
                at += size
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        assert read_all(client) == data
        sender.join()


@pytest.mark.parametrize("size", [READ_BYTES - 1, READ_BYTES, READ_BYTES + 1, 2 * READ_BYTES])
@pytest.mark.parametrize("at_once", [True, False], ids=["with its end", "its end later"])
def test_a_request_as_large_as_the_buffer(worker, size, at_once):
    """A full read says nothing about what comes next: more data, the end, or nothing for now."""
    front = worker.forward(worker.serve(echo).port)
    data = os.urandom(size)
    with front.connect() as client:
        client.sendall(data)
        came = b""
        while not at_once and len(came) < size:
            came += client.recv(size)
        client.shutdown(socket.SHUT_WR)
        assert came + read_all(client) == data


def test_timers_and_control_have_their_turn_under_constant_traffic():
    """The poller stays with the sockets while events come quickly, but not for ever."""
    with running(records=True, tcp_idle_timeout=3) as worker:
        balancer = worker.balancer([worker.serve(echo).port])
        front, closing = worker.listener(balancer), worker.listener(balancer)
        stop = threading.Event()

        def busy() -> None:
            with front.connect() as client:
                while not stop.is_set():
                    client.sendall(b"ping")
                    assert client.recv(4) == b"ping"

        threads = [threading.Thread(target=busy) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            with front.connect() as silent, closing.connect() as left:
                for sock in (silent, left):
                    sock.sendall(b"x")
                    assert sock.recv(1) == b"x"
                worker.close_listener(closing, drain=0.2)  # waits for the answer
                expect_reset(left)
                expect_reset(silent)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        worker.wait(lambda: {"idle", "drained"} <= {record.reason for record in worker.records})


def test_urgent_data_does_not_stop_the_stream(worker):
    got: list[bytes] = []

    def collect(conn: socket.socket) -> None:
        conn.sendall(b"ready")
        got.append(read_all(conn))

    front = worker.forward(worker.serve(collect).port)
    for round_ in range(20):
        with front.connect() as client:
            assert client.recv(5) == b"ready"
            for part in (b"one", b"two", b"three"):
                client.sendall(part)
                client.send(b"!", socket.MSG_OOB)
                client.sendall(b"end of " + part)
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b""
        wait_for(lambda count=round_ + 1: len(got) == count)
    # An urgent byte that is read before its mark is seen is dropped by the kernel; everything else must arrive.
    assert {data.replace(b"!", b"") for data in got} == {b"oneend of onetwoend of twothreeend of three"}


def test_a_bulk_stream_does_not_starve_small_ones(worker):
    def sink(conn: socket.socket) -> None:
        while conn.recv(MIB):
            pass

    bulk_front = worker.forward(worker.serve(sink).port)
    small_front = worker.forward(worker.serve(echo).port)
    stop = threading.Event()
    block = bytes(MIB)

    def flood(client: socket.socket) -> None:
        with client:
            while not stop.is_set():
                client.sendall(block)

    clients = [small_front.connect() for _ in range(200)]
    flooder = threading.Thread(target=flood, args=(bulk_front.connect(),))
    flooder.start()
    for _ in range(3):
        for client in clients:
            client.sendall(b"ping")
            assert (
                client.recv(4) == b"ping"
            )  # those that wait for the bulk stream, which has no end, wait too long
    assert flooder.is_alive()
    stop.set()
    flooder.join()
    for client in clients:
        client.close()


# -- descriptors and limits -------------------------------------------------------------------------------------------


def test_descriptors_are_reused_at_once_without_mixing_connections(worker):
    """Short connections of many clients, each with its own text; numbers are reused all the time."""
    front = worker.forward(worker.serve(echo).port)
    wrong: list[bytes] = []

    def client(number: int) -> None:
        for turn in range(60):
            text = f"{number}-{turn}-".encode() * 20
            with front.connect() as sock:
                sock.sendall(text)
                if turn % 3 == 0:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                    continue
                sock.shutdown(socket.SHUT_WR)
                if (answer := read_all(sock)) != text:
                    wrong.append(answer)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_left_of_closed_relays(worker):
    balancer = worker.balancer([worker.serve(names(b"a")).port])
    front = worker.listener(balancer)

    def batch() -> None:
        for _ in range(500):
            assert front.ask() == b"a"
        wait_for(lambda: idle(worker, balancer))

    descriptors = worker.descriptors()
    batch()
    memory = worker.rss()
    for _ in range(4):
        batch()
    wait_for(lambda: worker.descriptors() == descriptors)
    assert worker.rss() - memory < MIB


def test_out_of_descriptors_accepting_pauses_and_recovers():
    with running(files=128) as worker:
        began = time.monotonic()
        balancer = worker.balancer([worker.serve(echo).port])
        front = worker.listener(balancer)
        clients = [front.connect() for _ in range(120)]
        worker.wait(lambda: any("accepting paused" in text for text in worker.trouble))
        served = worker.total(balancer, s.OPENED)
        assert 20 < served < 64
        for client in clients[:20]:  # those that are served are served well meanwhile
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        worker.wait_idle()  # it does not spin
        assert worker.trouble_messages <= 2 + (time.monotonic() - began)  # once a second at most
        for client in clients[:60]:
            client.close()
        for client in clients[60:100]:  # these waited in the backlog
            client.sendall(b"y")
            assert client.recv(1) == b"y"
            client.close()
        for client in clients[100:]:
            client.close()
        wait_for(lambda: idle(worker, balancer))
        assert worker.total(balancer, s.FAILED) == 0


def test_a_service_that_is_its_own_endpoint_leaves_room_for_the_others():
    with running(files=256) as worker:
        own = listen()
        balancer = worker.balancer([own.getsockname()[1]])
        loop = worker.id()
        worker.apply(listeners=[ListenerConfig(loop, balancer, "TCP", "loop")], descriptors=[own.fileno()])
        other = worker.forward(worker.serve(names(b"a")).port)
        with own, socket.create_connection(own.getsockname()):
            worker.wait(lambda: any("accepting paused for it" in text for text in worker.trouble))
            for _ in range(20):
                assert other.ask() == b"a"


async def test_a_number_is_not_used_again_within_a_batch():
    """The first handler closes the second one's socket and opens another; the second's event must not reach it."""
    loop = asyncio.get_running_loop()
    errors: list[Exception] = []
    poller = Poller(loop, lambda _handler, error: errors.append(error))
    ends = [socket.socketpair() for _ in range(3)]
    called: list[str] = []
    opened: list[socket.socket] = []
    numbers = [near.fileno() for near, _ in ends]

    def first(_events: int) -> None:
        near, far = ends[1]
        poller.close(near)
        far.close()
        fresh, other = socket.socketpair()
        opened.extend((fresh, other))
        assert numbers[1] not in (fresh.fileno(), other.fileno())
        poller.add(fresh.fileno(), lambda _events: called.append("fresh"), IN)
        called.append("first")
        raise ValueError("on purpose")

    poller.add(numbers[0], first)
    poller.add(numbers[1], lambda _events: called.append("closed"))
    done = asyncio.Event()
    poller.add(numbers[2], lambda _events: (called.append("third"), done.set()))
    for _, far in ends:
        far.send(b"x")
    async with asyncio.timeout(10):
        await done.wait()
    for _ in range(3):  # whatever else is to come
        await asyncio.sleep(0.01)
    assert called == ["first", "third"], "an error in one handler ends neither the batch nor the poller"
    assert [str(error) for error in errors] == ["on purpose"]
    assert ends[1][0].fileno() == -1
    assert numbers[1] not in poller.handlers
    poller.shut()
    for sock in (*ends[0], *ends[2], *opened):
        sock.close()


async def test_a_worker_within_control():
    """As with --workers=0; a standard asyncio loop will do."""
    loop = asyncio.get_running_loop()
    ours, theirs = (Channel(sock) for sock in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    slots = s.Slots.create()
    stopped: asyncio.Future[int] = loop.create_future()
    worker = Worker(loop, theirs, slots, 0, Options(), on_stopped=stopped.set_result)
    worker.start()
    server = await asyncio.start_server(
        lambda _reader, writer: (writer.write(b"hello"), writer.close()), "127.0.0.1", 0
    )
    port = server.sockets[0].getsockname()[1]
    with listen() as front:
        ours.send(
            Apply(
                1,
                True,
                balancers=[BalancerConfig(1, "prod/web", [("127.0.0.1", port, 2)])],
                listeners=[ListenerConfig(1, 1, "TCP", "front")],
            ),
            [front.fileno()],
        )
        reader, writer = await asyncio.open_connection(*front.getsockname())
        async with asyncio.timeout(10):
            assert await reader.read() == b"hello"
            writer.close()
            await writer.wait_closed()
            ours.send(Shutdown(5.0))
            assert await stopped == 0
    heard = [ours.receive()[0] for _ in range(3)]
    assert heard == [Ready(os.getpid()), Acknowledged(1), Drained([1])]
    with pytest.raises(EOFError):
        ours.receive()
    ours.close()
    slots.close()
    server.close()
    await server.wait_closed()


# -- ending -----------------------------------------------------------------------------------------------------------


def test_a_closed_listener_refuses_and_its_relays_live_on(worker):
    balancer = worker.balancer([worker.serve(echo).port])
    front, empty = worker.listener(balancer), worker.listener(balancer)
    with front.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        worker.close_listener(front)
        worker.close_listener(empty)
        front.socket.close()
        empty.socket.close()
        with pytest.raises(ConnectionRefusedError):
            front.connect()
        worker.wait(lambda: worker.drained == [empty.number])
        client.sendall(b"y")
        assert client.recv(1) == b"y"
    worker.wait(lambda: worker.drained == [empty.number, front.number])


def test_a_drain_ends_what_is_left_and_touches_no_other_listener(worker):
    balancer = worker.balancer([worker.serve(echo).port])
    front, other = worker.listener(balancer), worker.listener(balancer)
    with front.connect() as client, other.connect() as bystander:
        for sock in (client, bystander):
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
        started = time.monotonic()
        worker.close_listener(front, drain=2)
        client.sendall(b"y")
        assert client.recv(1) == b"y"
        expect_reset(client)
        assert time.monotonic() - started > 1.9
        worker.wait(lambda: worker.drained == [front.number])
        bystander.sendall(b"z")
        assert bystander.recv(1) == b"z"
    worker.wait(lambda: len(worker.records) == 2)
    assert worker.records[0].reason == "drained"


def test_shutdown_waits_for_relays_then_ends(worker):
    front = worker.forward(worker.serve(echo).port)
    with front.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        worker.shutdown(100)
        assert worker.process.poll() is None
        client.sendall(b"y")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"y"
    assert worker.process.wait(DEADLINE) == 0


def test_shutdown_ends_relays_when_the_time_is_over(worker):
    front = worker.forward(worker.serve(echo).port)
    with front.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        worker.shutdown(0.3)
        expect_reset(client)
    assert worker.process.wait(DEADLINE) == 0


def test_the_worker_ends_when_control_is_gone_and_ignores_the_terminal():
    with running() as worker:
        worker.process.send_signal(signal.SIGINT)
        worker.process.send_signal(signal.SIGTERM)
        front = worker.forward(worker.serve(names(b"a")).port)
        assert front.ask() == b"a"
        with front.connect():
            worker.channel.close()
            assert worker.process.wait(DEADLINE) == 1


def test_idle_relays_are_ended_and_busy_ones_are_not():
    with running(records=True, tcp_idle_timeout=2.5) as worker:
        front = worker.forward(worker.serve(echo).port)
        with front.connect() as silent, front.connect() as busy:
            silent.settimeout(0.2)
            end = time.monotonic() + DEADLINE
            while time.monotonic() < end:
                busy.sendall(b"x")
                assert busy.recv(1) == b"x"
                try:
                    silent.recv(1)
                except TimeoutError:
                    continue
                except ConnectionResetError:
                    break
            else:
                pytest.fail("the silent relay lives")
            busy.sendall(b"x")
            assert busy.recv(1) == b"x"
        worker.wait(lambda: any(record.reason == "idle" for record in worker.records))


# -- figures and messages ---------------------------------------------------------------------------------------------


def test_counters_and_records(worker):
    server = worker.serve(echo)
    balancer = worker.balancer([server.port])
    front = worker.listener(balancer)
    with front.connect() as client:
        client.sendall(b"x" * 1000)
        wait_for(lambda: worker.total(balancer, s.BYTES_OUT) == 1000)  # while it is open
        assert (worker.total(balancer, s.OPENED), worker.total(balancer, s.CLOSED)) == (1, 0)
        client.shutdown(socket.SHUT_WR)
        assert len(read_all(client)) == 1000
    worker.wait(lambda: worker.records)
    for slot in (balancer, 1000):
        values = [worker.total(slot, field) for field in (s.OPENED, s.CLOSED, s.FAILED, s.ATTEMPTS)]
        assert values == [1, 1, 0, 1]
        assert (worker.total(slot, s.BYTES_IN), worker.total(slot, s.BYTES_OUT)) == (1000, 1000)
        assert 0 < worker.total(slot, s.CONNECT_US) < 1_000_000
    record = worker.records[0]
    assert (record.service, record.endpoint) == ("prod/web", f"127.0.0.1:{server.port}")
    assert record.frontend == f"127.0.0.1:{front.port}"
    assert (record.bytes_in, record.bytes_out, record.attempts, record.reason) == (1000, 1000, 1, "closed")
    assert 0 < record.seconds < 60
    assert abs(record.finished - time.time()) < 60


def test_records_are_bounded_while_control_does_not_read(worker):
    balancer = worker.balancer([refusing_port()])
    front = worker.listener(balancer)

    def clients() -> None:
        for _ in range(1500):
            with pytest.raises(ConnectionResetError):
                front.read()

    threads = [threading.Thread(target=clients) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: worker.total(balancer, s.CLOSED) == 6000)
    worker.wait(lambda: len(worker.records) + worker.dropped == 6000)
    assert worker.dropped > 0
    worker.apply()  # answered, in spite of it all


def test_what_cannot_be_opened_is_reported_and_the_rest_is_served(worker):
    server = worker.serve(names(b"a"))
    balancer = worker.balancer([server.port, ("not an address", 80)])
    with socket.socket(socket.AF_UNIX) as plain:
        plain_configs = [
            ListenerConfig(901, balancer, "GRE", "10.0.0.1:1"),
            ListenerConfig(902, 77, "TCP", "10.0.0.1:2"),
            ListenerConfig(903, balancer, "TCP", "10.0.0.1:3"),
        ]
        worker.apply(listeners=plain_configs, descriptors=[plain.fileno()] * 2)
    worker.apply(drop_balancers=[999])
    front = worker.listener(balancer)
    assert front.ask() == b"a"
    for part in ("GRE is not relayed", "no balancer 77", "without a descriptor", "not an IP address"):
        worker.wait(lambda part=part: any(part in text for text in worker.trouble))
    worker.apply(close=[])
    assert worker.process.poll() is None


def test_a_daemon_from_before_0_2_starts_this_worker_with_a_flag_for_each_option():
    flags = (
        "--workers=2", "--tcp-idle-timeout=1.0", "--udp-timeout=60.0", "--sctp-max-message=262144", "--no-tcp-splice",
        "--records",
    )  # fmt: skip
    with running(*flags) as worker:
        front = worker.forward(worker.serve(read_all).port)
        with front.connect() as client:
            expect_reset(client)  # idle
        worker.wait(lambda: worker.records)
        assert worker.records[0].reason == "idle"


def test_a_listening_socket_that_was_shut_down_is_let_go(worker):
    balancer = worker.balancer([worker.serve(names(b"a")).port])
    front, other = worker.listener(balancer), worker.listener(balancer)
    before = worker.descriptors()
    front.socket.shutdown(socket.SHUT_RDWR)
    worker.wait(lambda: worker.descriptors() == before - 1)
    worker.wait_idle()  # it does not spin
    worker.close_listener(front)
    worker.wait(lambda: worker.drained == [front.number])
    assert other.ask() == b"a"
    assert not worker.trouble, "control shuts a listener down on purpose"


def test_garbage_from_control_is_survived(worker):
    raw = socket.socket(fileno=os.dup(worker.channel.fileno()))
    with raw:
        for garbage in (b"\x00", b"\xc1" * 100, os.urandom(5000), b"\x81\xa4type\xa5apply"):
            raw.send(garbage)
    front = worker.forward(worker.serve(names(b"a")).port)
    assert front.ask() == b"a"
    worker.wait(lambda: any("unreadable message" in text for text in worker.trouble))


def test_an_update_in_parts_is_answered_once(worker):
    worker.channel.send(Apply(41, False, balancers=[BalancerConfig(41, "prod/a", [])]))
    worker.channel.send(Apply(41, True))
    worker.wait(lambda: worker.acknowledged == 41)
