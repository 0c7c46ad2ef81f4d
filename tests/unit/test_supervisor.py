"""The supervisor with real worker processes; pauses and probes go by a clock that the test moves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from proxyd.api.service import Protocol, TrafficPolicy
from proxyd.control.runtime.logs import Summariser, get_logger
from proxyd.control.workers import supervisor as module
from proxyd.control.workers.publication import Publication, Update
from proxyd.control.workers.supervisor import (
    MAX_PAUSE_SECONDS,
    MAX_QUEUED,
    MAX_UNANSWERED,
    MAX_UNANSWERED_AT_START,
    SILENT_PROBES,
    STEADY_SECONDS,
    Events,
    Supervisor,
    Worker,
)
from proxyd.relay.ipc.options import Options
from proxyd.relay.ipc.slots import CLOSED, OPENED, Slots
from proxyd.state.spec import (
    BalancerKey,
    BalancerSpec,
    Endpoint,
    ListenerKey,
    ListenerSpec,
    Role,
    ServicePortName,
)
from tests.support.manual_loop import ManualLoop
from tests.support.waiting import DEADLINE
from tests.support.worker import Server, echo, listen, names, read_all

WEB = BalancerKey(ServicePortName("prod", "web", "", Protocol.TCP), TrafficPolicy.CLUSTER, 4)


class Lab:
    """A supervisor in a loop that the test turns, and what it reports."""

    def __init__(self, resources: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self._resources = resources
        self.loop = loop = resources.enter_context(ManualLoop())
        loop.rule(monkeypatch, module)
        self.logged = resources.enter_context(capture_logs())
        slots = Slots.create()
        resources.callback(slots.close)
        self.publication = Publication(slots, count)
        resources.callback(self.publication.close_all)
        self.drained: list[tuple[int, list[int]]] = []
        self.died: list[int] = []
        self.supervisor = loop.call(
            lambda: Supervisor(
                count,
                slots,
                self.publication,
                Options(workers=count),
                summariser=Summariser(get_logger("test"), clock=loop.time),
            )
        )
        resources.callback(self.supervisor.kill)

    def start(self) -> None:
        """Start the workers; wait for nothing."""
        self.supervisor.start(
            Events(
                acknowledged=lambda: None,
                drained=lambda worker, numbers: self.drained.append((worker, numbers)),
                died=self.died.append,
                connections=lambda *_: None,
                trouble=lambda *_: None,
                failures=lambda *_: None,
            )
        )

    def in_force(self) -> None:
        """Wait until every worker has everything."""
        self.loop.until(lambda: not self.supervisor.lagging())

    def worker(self, index: int = 0) -> Worker:
        return self.supervisor.workers[index]

    def kill(self, index: int = 0) -> None:
        """Kill a worker; wait until that is noticed."""
        before = self.worker(index)
        os.kill(before.pid, signal.SIGKILL)
        self.loop.until(lambda: self.supervisor.workers.get(index) is not before)

    def stopped(self, index: int = 0) -> Worker:
        """A worker that does nothing any more, though its process lives."""
        worker = self.worker(index)
        os.kill(worker.pid, signal.SIGSTOP)
        self.loop.until(lambda: state(worker.pid) == "T")
        return worker

    def run(self, what: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(what)
        self.loop.turn()
        return task

    def server(self, server: Server) -> Server:
        self._resources.callback(server.close)
        return server

    def set_endpoints(self, *ports: int) -> None:
        endpoints = tuple(Endpoint("127.0.0.1", port) for port in ports)
        self.publication.set_balancer(BalancerSpec(key=WEB, endpoints=endpoints))

    def open(self) -> tuple[ListenerSpec, int]:
        """A listener of the balancer, and its port."""
        sock = listen()
        sock.setblocking(False)
        port = sock.getsockname()[1]
        key = ListenerKey("127.0.0.1", port, Protocol.TCP)
        spec = ListenerSpec(key=key, balancer=WEB, role=Role.CLUSTER_IP)
        self.publication.open(spec, sock)
        return spec, port

    def client(self, port: int) -> socket.socket:
        return self._resources.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE))

    def publish(self) -> None:
        self.supervisor.publish(self.publication.take_update())


def state(pid: int) -> str:
    """As proc(5) has it; "" of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.fixture
def resources() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as resources:
        yield resources


@pytest.fixture
def lab(resources: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(resources, monkeypatch, 1)


@pytest.fixture
def two(resources: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(resources, monkeypatch, 2)


def echoes(client: socket.socket) -> bool:
    client.sendall(b"still there?")
    return client.recv(100) == b"still there?"


# Generations


def test_a_generation_is_in_force_when_every_worker_has_acknowledged_it(two: Lab) -> None:
    supervisor = two.supervisor
    two.set_endpoints(1)
    two.publication.take_update()
    two.start()
    assert supervisor.lagging()
    assert supervisor.acknowledged() == -1
    two.in_force()
    assert supervisor.acknowledged() == 1

    slow = two.stopped(1)
    two.set_endpoints(1, 2)
    two.publish()
    two.loop.until(lambda: two.worker(0).acknowledged == 2)
    assert supervisor.lagging()
    assert supervisor.acknowledged() == 1

    os.kill(slow.pid, signal.SIGCONT)
    two.in_force()
    assert supervisor.acknowledged() == 2

    two.kill(1)
    assert supervisor.lagging()
    assert supervisor.acknowledged() == -1


def test_what_a_worker_does_not_read_yet_waits_and_is_sent_when_it_reads(lab: Lab) -> None:
    server = lab.server(Server(names(b"a")))
    lab.set_endpoints(1)
    lab.publication.take_update()
    lab.start()
    lab.in_force()
    assert not lab.supervisor.telling()
    worker = lab.stopped()
    lab.set_endpoints(*range(1, 2000))
    much = lab.publication.take_update()
    while not lab.supervisor.telling():  # until the channel is full
        lab.supervisor.publish(much)
    lab.set_endpoints(server.port)
    _, port = lab.open()
    lab.publish()
    assert lab.supervisor.telling()
    os.kill(worker.pid, signal.SIGCONT)
    lab.in_force()
    assert not lab.supervisor.telling()
    assert lab.worker() is worker
    assert lab.supervisor.acknowledged() == lab.publication.generation
    assert read_all(lab.client(port)) == b"a"


def test_a_worker_that_reads_nothing_at_all_is_replaced_before_memory_runs_out(lab: Lab) -> None:
    lab.start()
    lab.in_force()
    worker = lab.stopped()
    for _ in range(2 * MAX_QUEUED):
        lab.supervisor.publish(Update(lab.publication.generation))
        if not lab.supervisor.workers:
            break
    assert not state(worker.pid)
    assert any(line["event"].startswith("worker does not read its updates") for line in lab.logged)
    lab.loop.turn()
    lab.in_force()
    assert lab.worker().pid != worker.pid


def test_a_new_worker_is_told_everything_in_force_and_nothing_that_is_not(two: Lab) -> None:
    first, second = two.server(Server(names(b"first"))), two.server(Server(names(b"second")))
    two.set_endpoints(first.port)
    closed, _ = two.open()
    _, port = two.open()
    two.publication.take_update()
    two.start()
    two.in_force()
    assert read_all(two.client(port)) == b"first"
    two.set_endpoints(second.port)
    two.publication.close(closed.key, None)
    _, later = two.open()
    two.publish()
    two.in_force()

    with contextlib.ExitStack() as stopped:
        for index in range(2):  # so that the other worker answers none of the clients
            two.kill(index)
            two.in_force()
            other = two.stopped(1 - index)
            stopped.callback(os.kill, other.pid, signal.SIGCONT)
            for _ in range(4):
                assert {read_all(two.client(each)) for each in (port, later)} == {b"second"}
            os.kill(other.pid, signal.SIGCONT)
            stopped.pop_all()
    assert two.supervisor.acknowledged() == two.publication.generation == 2
    assert len(two.publication.full().listeners) == 2


def test_the_last_relay_of_a_closed_listener_is_reported(lab: Lab) -> None:
    server = lab.server(Server(echo))
    lab.set_endpoints(server.port)
    spec, port = lab.open()
    lab.publication.take_update()
    number = lab.publication.held[spec.key].id
    lab.start()
    lab.in_force()
    client = lab.client(port)
    assert echoes(client)
    lab.publication.close(spec.key, None)
    lab.publish()
    lab.in_force()
    assert echoes(client)
    assert lab.drained == []
    client.close()
    lab.loop.until(lambda: lab.drained)
    assert lab.drained == [(0, [number])]


# Death


def test_a_worker_that_dies_is_started_again_and_the_others_go_on(two: Lab) -> None:
    two.start()
    two.in_force()
    other = two.worker(1)
    two.kill(0)
    assert two.died == [0]
    two.loop.turn()
    two.in_force()
    assert two.worker(1) is other
    assert two.supervisor.restarts == {0: 1}
    (line,) = [line for line in two.logged if line["log_level"] == "error"]
    assert (line["worker"], line["how"]) == (0, "SIGKILL")


def test_what_a_dead_worker_had_open_counts_as_closed(lab: Lab) -> None:
    server = lab.server(Server(echo))
    lab.set_endpoints(server.port)
    _, port = lab.open()
    lab.publication.take_update()
    lab.start()
    lab.in_force()
    assert echoes(lab.client(port))

    def counts() -> tuple[int, int]:
        row = lab.publication.row(WEB)
        return row[OPENED], row[CLOSED]

    assert counts() == (1, 0)
    lab.kill()
    assert counts() == (1, 1)


def test_a_worker_that_keeps_dying_is_started_again_after_a_growing_pause(lab: Lab) -> None:
    lab.start()
    pauses = []
    for _ in range(9):
        lab.kill()
        died = lab.loop.now
        lab.loop.turn()
        while not lab.supervisor.workers:
            lab.loop.advance(0.05)
        pauses.append(lab.loop.now - died)
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert all(0 < pause < 1 for pause in pauses[1:4])
    assert pauses[-1] == pytest.approx(MAX_PAUSE_SECONDS)
    assert pauses[1] < pauses[2] < pauses[3] < pauses[4]
    assert lab.supervisor.restarts == {0: 9}
    # Of a series of deaths one is said at once.
    assert len([line for line in lab.logged if line["event"].startswith("worker died")]) <= 2

    lab.loop.now += STEADY_SECONDS + 0.1
    lab.kill()
    lab.loop.turn()
    assert lab.supervisor.workers


def test_each_worker_has_pauses_of_its_own(two: Lab) -> None:
    two.start()
    for _ in range(5):
        two.kill(0)
        two.loop.advance(MAX_PAUSE_SECONDS)
    two.kill(1)
    two.loop.turn()
    assert 1 in two.supervisor.workers


def test_a_worker_that_cannot_be_started_is_tried_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.start()
    lab.kill()
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/nonexistent/python")
        for _ in range(3):
            lab.loop.advance(MAX_PAUSE_SECONDS)
            assert not lab.supervisor.workers
    lab.loop.advance(MAX_PAUSE_SECONDS)
    lab.in_force()
    refused = [line for line in lab.logged if line["event"].startswith("worker can't be started")]
    assert len(refused) == 3
    assert "/nonexistent/python" in refused[0]["error"]


# Silence


def test_a_silent_worker_is_said_to_be_so_and_then_replaced(two: Lab) -> None:
    two.start()
    two.in_force()
    assert two.supervisor.probe() == ""
    two.loop.until(lambda: not any(worker.unanswered for worker in two.supervisor.workers.values()))
    other, silent = two.worker(0), two.stopped(1)

    def probe() -> str:
        wrong = two.supervisor.probe()
        two.loop.until(lambda: not other.unanswered)
        return wrong

    answers = [probe() for _ in range(MAX_UNANSWERED)]
    assert answers[:SILENT_PROBES] == [""] * SILENT_PROBES
    assert set(answers[SILENT_PROBES:]) == {"1 of 2 workers do not answer"}
    assert two.worker(1) is silent

    assert probe() == "1 of 2 workers do not run"
    assert not state(silent.pid)
    assert two.died == [1]
    two.loop.turn()
    assert two.supervisor.probe() == "1 of 2 workers do not run"  # it starts
    two.in_force()
    assert two.supervisor.probe() == ""
    assert two.worker(0) is other


def test_a_worker_that_answers_now_and_then_is_never_replaced(lab: Lab) -> None:
    lab.start()
    lab.in_force()
    worker = lab.worker()
    for _ in range(4):
        lab.stopped()
        for _ in range(MAX_UNANSWERED - 1):
            lab.supervisor.probe()
        os.kill(worker.pid, signal.SIGCONT)
        lab.loop.until(lambda: not worker.unanswered)
        assert lab.supervisor.probe() == ""
    assert lab.worker() is worker


def test_a_worker_may_take_long_to_start(lab: Lab) -> None:
    lab.start()
    slow = lab.stopped()
    for _ in range(MAX_UNANSWERED_AT_START):
        assert lab.supervisor.probe() == "1 of 1 workers do not run"
    os.kill(slow.pid, signal.SIGCONT)
    lab.in_force()
    assert lab.supervisor.probe() == "", "what it missed while it started is not held against it"
    assert lab.worker() is slow


def test_a_worker_that_hangs_in_its_start_is_replaced(lab: Lab) -> None:
    lab.start()
    silent = lab.stopped()
    for _ in range(MAX_UNANSWERED_AT_START + 1):
        assert lab.supervisor.probe() == "1 of 1 workers do not run"
    assert not state(silent.pid)
    lab.loop.turn()
    lab.in_force()


NONSENSE = """
import os, socket, sys, time
(fd,) = (one for one in sys.argv if one.startswith("--channel-fd="))
channel = socket.socket(fileno=int(fd.partition("=")[2]))
channel.send(b"\\x92nonsense")
open(__file__ + ".said", "x").close()
time.sleep(600)
"""


def test_a_worker_that_talks_nonsense_is_listened_to_no_more_and_replaced(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}{NONSENSE}")
    program.chmod(0o755)
    with monkeypatch.context() as other:
        other.setattr(sys, "executable", str(program))
        lab.start()
    worker = lab.worker()
    lab.loop.until(program.with_suffix(".said").exists)
    for _ in range(MAX_UNANSWERED_AT_START + 1):
        lab.loop.turn()
        lab.supervisor.probe()
    assert not state(worker.pid)
    lab.loop.turn()
    lab.in_force()


# The end


def test_the_last_words_of_a_worker_are_heard_though_it_is_gone_already(lab: Lab) -> None:
    server = lab.server(Server(echo))
    lab.set_endpoints(server.port)
    spec, port = lab.open()
    lab.publication.take_update()
    number = lab.publication.held[spec.key].id
    lab.start()
    lab.in_force()
    assert echoes(lab.client(port))
    worker = lab.worker()
    ended = lab.run(lab.supervisor.stop(0))
    os.waitid(os.P_PIDFD, worker.pidfd, os.WEXITED | os.WNOWAIT)
    lab.loop.until(ended.done)
    assert lab.drained == [(0, [number])]


def test_the_end_comes_also_where_a_worker_does_not_read_that(
    two: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.start()
    two.in_force()
    silent = two.stopped(0)
    update = Update(two.publication.generation)
    while not silent.outgoing:
        two.supervisor.publish(update)
    monkeypatch.setattr(module, "MAX_QUEUED", len(silent.outgoing))
    ended = two.run(two.supervisor.stop(600))
    two.loop.until(ended.done)
    ended.result()
    assert two.died[0] == 0
    assert not state(silent.pid)


def test_relays_go_on_while_they_drain_and_then_the_worker_ends(lab: Lab) -> None:
    server = lab.server(Server(echo))
    lab.set_endpoints(server.port)
    _, port = lab.open()
    lab.publication.take_update()
    lab.start()
    lab.in_force()
    client, pid = lab.client(port), lab.worker().pid
    assert echoes(client)
    lab.publication.close_all()
    ended = lab.run(lab.supervisor.stop(600))
    for _ in range(3):
        lab.loop.turn()
        assert echoes(client)
    assert not ended.done()
    client.close()
    lab.loop.until(ended.done)
    assert not state(pid)
    lab.loop.advance(60)
    assert not lab.supervisor.workers
    assert not [line for line in lab.logged if line["log_level"] == "error"]


def test_relays_that_are_alive_after_the_drain_are_ended(lab: Lab) -> None:
    server = lab.server(Server(echo))
    lab.set_endpoints(server.port)
    _, port = lab.open()
    lab.publication.take_update()
    lab.start()
    lab.in_force()
    client = lab.client(port)
    assert echoes(client)
    ended = lab.run(lab.supervisor.stop(0.1))
    lab.loop.until(ended.done)
    with contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""


def test_a_worker_that_does_not_end_is_killed_after_the_drain_and_a_margin(lab: Lab) -> None:
    lab.start()
    lab.in_force()
    worker = lab.stopped()
    ended = lab.run(lab.supervisor.stop(10))
    lab.loop.advance(10)
    lab.loop.turn(5)
    assert not ended.done()
    assert state(worker.pid) == "T"
    lab.loop.advance(5)
    lab.loop.until(ended.done)
    assert not state(worker.pid)


def test_a_worker_that_has_drained_does_not_come_back_while_others_drain(two: Lab) -> None:
    two.start()
    two.in_force()
    slow = two.stopped(1)
    two.run(two.supervisor.stop(600))
    two.loop.until(lambda: 0 not in two.supervisor.workers)
    two.loop.advance(60)
    assert two.supervisor.workers == {1: slow}


def test_a_second_order_kills_all_at_once(two: Lab) -> None:
    two.start()
    two.in_force()
    pids = [two.stopped(index).pid for index in range(2)]
    ended = two.run(two.supervisor.stop(600))
    two.supervisor.kill()
    assert not any(map(state, pids))
    two.loop.until(ended.done)
    assert sorted(two.died) == [0, 1]
    two.loop.advance(60)
    assert not two.supervisor.workers


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_worker_that_waits_for_its_new_start_is_not_started_after_the_end(lab: Lab, how: str) -> None:
    lab.start()
    for _ in range(4):
        lab.loop.advance(0.5)
        lab.kill()
    assert not lab.supervisor.workers
    if how == "stop":
        lab.loop.until(lab.run(lab.supervisor.stop(600)).done)
    else:
        lab.supervisor.kill()
    lab.loop.advance(60)
    assert not lab.supervisor.workers
