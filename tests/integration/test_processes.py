"""Processes that end, by their own will or not: workers, control, draining, restarts, and what is left on the node."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.support.clients import Load, answers, ask, connect, lines_of, many, read_line, refused
from tests.support.daemon import Proxyd, is_alive
from tests.support.manifests import endpoints, service, write
from tests.support.netlab import EXTERNAL_IP, NODE_IP, OUTSIDE_IP, Lab, routes_and_rules
from tests.support.opens import Opens
from tests.support.sockets import client_ports, held_by
from tests.support.waiting import wait_for

VIP = "10.96.0.10"
OTHER_VIP = "10.96.0.20"

Run = Callable[..., Proxyd]


def write_web(manifests: Path) -> None:
    """One Service with every kind of address."""
    write(
        manifests / "web.yaml",
        service("web", VIP, node_port=30080, externalIPs=[EXTERNAL_IP]),
        endpoints("web", 1, 2, 3),
    )


def wait_serving(daemon: Proxyd) -> None:
    for ip, port in ((VIP, 80), (NODE_IP, 30080), (EXTERNAL_IP, 80)):
        daemon.wait_listener(ip, port)


def test_killing_a_worker_breaks_only_its_relays(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write_web(manifests)
    daemon = proxyd(workers=2)
    wait_serving(daemon)
    workers = daemon.worker_pids()
    assert len(workers) == 2
    with ExitStack() as stack:
        kept = [stack.enter_context(connect(lab.client, VIP, 80)) for _ in range(40)]
        for sock in kept:
            sock.sendall(b"echo\nbefore\n")
        for sock in kept:
            assert read_line(sock) == "before"
        # Kill the one that holds more of them; there is no promise of how they are shared.
        ports = client_ports(lab.node, 80)
        shares = {pid: {ports[inode] for inode in held_by(pid) & ports.keys()} for pid in workers}
        assert sum(len(share) for share in shares.values()) == 40
        victim = max(workers, key=lambda pid: len(shares[pid]))
        load = stack.enter_context(Load(lab.client, VIP, 80, clients=4))
        load.wait_more(100)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        wait_for(
            lambda: len(daemon.worker_pids()) == 2 and victim not in daemon.worker_pids(),
            "a new worker",
        )
        back = time.monotonic() - killed
        load.wait_more(200)
        for sock in kept:
            try:
                sock.sendall(b"after\n")
                survived = sock.recv(6) == b"after\n"
            except ConnectionError:
                survived = False
            assert survived == (sock.getsockname()[1] not in shares[victim])
    print(f"a new worker after {back * 1000:.0f} ms; {load.outcome.total} answered, {load.outcome.broken}")
    assert load.outcome.refused == []
    # Each of the four clients had at most one connection in the worker.
    assert len(load.outcome.broken) <= 4


def test_killing_the_only_worker_makes_clients_wait_but_not_fail(
    lab: Lab, manifests: Path, proxyd: Run
) -> None:
    write_web(manifests)
    daemon = proxyd(workers=1)
    wait_serving(daemon)
    took = []
    for _ in range(2):  # and its successor
        (victim,) = daemon.worker_pids()
        with Load(lab.client, VIP, 80, clients=4) as load:
            load.wait_more(50)
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            wait_for(lambda pid=victim: not is_alive(pid), "the worker to be dead")  # type: ignore[misc]  # a bound default has no type
            load.wait_more(10)
            took.append(time.monotonic() - killed)
        assert load.outcome.refused == []
        assert len(load.outcome.broken) <= 4
    print(f"answers again after {', '.join(f'{seconds * 1000:.0f} ms' for seconds in took)}")


def test_a_worker_killed_four_times_in_a_row_is_back_each_time(
    lab: Lab, manifests: Path, proxyd: Run
) -> None:
    write_web(manifests)
    daemon = proxyd(workers=1)
    wait_serving(daemon)
    took = []
    with Load(lab.client, VIP, 80, clients=2) as load:
        for _ in range(4):
            load.wait_more(20)
            (victim,) = daemon.worker_pids()
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            wait_for(
                lambda pid=victim: daemon.worker_pids() not in ([], [pid]),  # type: ignore[misc]  # as above
                "a new worker",
            )
            took.append(time.monotonic() - killed)
    print(f"a new worker after {', '.join(f'{seconds * 1000:.0f} ms' for seconds in took)}")
    assert load.outcome.refused == []
    assert len(load.outcome.broken) <= 4 * 2
    # The first death is a line of its own, the others are summed up.
    assert daemon.log().count("worker died") == 1
    assert daemon.stop() == 0
    first, *rest = [json.loads(line) for line in daemon.log().splitlines() if "worker died" in line]
    assert first.get("count", 1) == 1
    assert sum(line["count"] for line in rest) == 3


def test_a_new_worker_has_the_changes_made_since(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = proxyd(workers=1)
    daemon.wait_listener(VIP, 80)
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 2))
    write(manifests / "other.yaml", service("other", OTHER_VIP), endpoints("other", 3))
    daemon.wait_listener(OTHER_VIP, 80)
    (victim,) = daemon.worker_pids()
    os.kill(victim, signal.SIGKILL)
    assert many(lab.client, VIP, 80, 5).answered == {"pod-2": 5}
    assert many(lab.client, OTHER_VIP, 80, 5).answered == {"pod-3": 5}


def test_a_worker_that_hangs_does_not_hold_an_address(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, node_port=30080))
    write(manifests / "endpoints.yaml", endpoints("web", 1))
    daemon = proxyd(workers=2)
    daemon.wait_listener(NODE_IP, 30080)
    hanging = daemon.worker_pids()[0]
    os.kill(hanging, signal.SIGSTOP)
    try:
        # It cannot close its copies of the listening sockets: they must not listen all the same.
        write(manifests / "endpoints.yaml", endpoints("web"))
        daemon.wait_listener(NODE_IP, 30080, "NoEndpoints")
        assert refused(lab.client, VIP, 80)
        assert refused(lab.outside, NODE_IP, 30080)
        write(manifests / "endpoints.yaml", endpoints("web", 2))
        daemon.wait_listener(NODE_IP, 30080)
        daemon.wait_listener(VIP, 80)
        assert ask(lab.outside, NODE_IP, 30080) == "pod-2"
    finally:
        with suppress(ProcessLookupError):  # where all this took long, it was replaced
            os.kill(hanging, signal.SIGCONT)
    assert many(lab.client, VIP, 80, 10).answered == {"pod-2": 10}


def test_killing_control_ends_the_workers_and_a_new_start_works(
    lab: Lab, folder: Path, manifests: Path, proxyd: Run
) -> None:
    write_web(manifests)
    write(manifests / "other.yaml", service("other", OTHER_VIP), endpoints("other", 1))
    clean = routes_and_rules(lab.node)
    daemon = proxyd(workers=2)
    wait_serving(daemon)
    daemon.wait_listener(OTHER_VIP, 80)
    workers = daemon.worker_pids()
    daemon.signal(signal.SIGKILL)
    assert daemon.wait() == -signal.SIGKILL
    wait_for(lambda: not any(is_alive(pid) for pid in workers), "the workers to end")
    # While nobody looked, one Service went and another lost its external address.
    (manifests / "other.yaml").unlink()
    write(manifests / "web.yaml", service("web", VIP, node_port=30080), endpoints("web", 2))
    again = proxyd(workers=2)
    again.wait_listener(VIP, 80)
    again.wait_listener(NODE_IP, 30080)
    assert many(lab.client, VIP, 80, 5).answered == {"pod-2": 5}
    assert ask(lab.outside, NODE_IP, 30080) == "pod-2"
    assert ask(lab.outside, EXTERNAL_IP, 80) == "far"
    assert OTHER_VIP not in lab.node.run("ip", "route", "show", "table", "local")
    assert again.stop() == 0
    assert routes_and_rules(lab.node) == clean


def test_sigterm_leaves_nothing_on_the_node(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write_web(manifests)
    clean = routes_and_rules(lab.node)
    daemon = proxyd(workers=2, flags=("--drain-timeout", "600s"))
    wait_serving(daemon)
    assert routes_and_rules(lab.node) != clean  # or this would show nothing
    workers = daemon.worker_pids()
    assert daemon.stop() == 0  # with no connection there is nothing to wait for
    assert not any(is_alive(pid) for pid in workers)
    assert routes_and_rules(lab.node) == clean
    assert not daemon.socket.exists()
    assert ask(lab.outside, EXTERNAL_IP, 80) == "far"


def test_sigint_stops_as_cleanly(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write_web(manifests)
    clean = routes_and_rules(lab.node)
    daemon = proxyd()
    wait_serving(daemon)
    daemon.signal(signal.SIGINT)
    assert daemon.wait() == 0
    assert routes_and_rules(lab.node) == clean
    assert "Traceback" not in daemon.log()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_signal_while_manifests_are_first_read_ends_the_program_there(
    lab: Lab, folder: Path, manifests: Path, number: signal.Signals, code: int
) -> None:
    # A comment beside a value makes each document one for libyaml: all of this takes it tens of seconds.
    port = "spec: {ports: [{port: 80}]} # the full reader reads this\n"
    for file in range(60):
        names = (f"s{file}-{document}" for document in range(6000))
        text = "---\n".join(
            f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n{port}" for name in names
        )
        (manifests / f"{file:02}.yaml").write_text(text)
    daemon = Proxyd(lab.node, folder, manifests)
    opened: set[str] = set()
    with Opens(manifests) as opens:
        daemon.start(wait=False)
        try:
            wait_for(lambda: opened.update(opens.take()) or "01.yaml" in opened, "a file to be opened", 60)
            daemon.signal(number)
            assert daemon.wait() == code
        finally:
            daemon.__exit__()
        assert "59.yaml" not in {*opened, *opens.take()}
    assert "Traceback" not in daemon.log()
    assert not daemon.socket.exists()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_sigterm_drains(lab: Lab, manifests: Path, proxyd: Run, workers: int) -> None:
    write_web(manifests)
    clean = routes_and_rules(lab.node)
    daemon = proxyd(workers=workers)
    wait_serving(daemon)
    # An external address is another host's again once nothing of ours is open there, so it is not among these.
    with connect(lab.client, VIP, 80) as by_vip, connect(lab.outside, NODE_IP, 30080) as by_node_port:
        for sock in (by_vip, by_node_port):
            sock.sendall(b"echo\nbefore\n")
            assert read_line(sock) == "before"
        daemon.signal(signal.SIGTERM)
        wait_for(
            lambda: refused(lab.outside, NODE_IP, 30080), "new connections to the NodePort to be refused"
        )
        assert not answers(lab.client, VIP, 80)
        time.sleep(0.5)
        for sock in (by_vip, by_node_port):
            sock.sendall(b"after\n")
            assert read_line(sock) == "after"
        assert daemon.process.poll() is None
    assert daemon.wait() == 0
    assert routes_and_rules(lab.node) == clean


def test_the_drain_time_is_the_longest_that_an_exit_takes(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write_web(manifests)
    daemon = proxyd(flags=("--drain-timeout", "1s"))
    wait_serving(daemon)
    with connect(lab.client, VIP, 80) as sock:
        sock.sendall(b"echo\nbefore\n")
        assert read_line(sock) == "before"
        begin = time.monotonic()
        assert daemon.stop() == 0
        took = time.monotonic() - begin
    assert 0.5 < took < 25  # what it would be without the flag


def test_a_second_run_serves_the_same_addresses(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web"), endpoints("web", 1))
    write(manifests / "other.yaml", service("other", type="NodePort"), endpoints("other", 2))
    daemon = proxyd()
    vips = {name: daemon.vip(name) for name in ("default/web", "default/other")}
    listeners = {(each.ip, each.port) for each in daemon.listeners()}
    assert daemon.stop() == 0
    # A Service that sorts before them does not get their addresses.
    write(manifests / "another.yaml", service("another"), endpoints("another", 3))
    again = proxyd()
    assert {name: again.vip(name) for name in vips} == vips
    again.wait_listener(again.vip("default/another"), 80)
    assert listeners <= {(each.ip, each.port) for each in again.listeners()}
    assert ask(lab.client, vips["default/web"], 80) == "pod-1"
    assert ask(lab.client, vips["default/other"], 80) == "pod-2"


def test_sighup_reloads_and_disturbs_nobody(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write_web(manifests)
    daemon = proxyd(workers=2)
    wait_serving(daemon)
    with connect(lab.client, VIP, 80) as kept, Load(lab.client, VIP, 80) as load:
        kept.sendall(b"echo\nbefore\n")
        assert read_line(kept) == "before"
        for pod in (1, 2, 3):
            write(manifests / "web.yaml", service("web", VIP, node_port=30080), endpoints("web", pod))
            daemon.signal(signal.SIGHUP)
            wait_for(lambda pod=pod: ask(lab.client, VIP, 80) == f"pod-{pod}", "the change in force")  # type: ignore[misc]  # a bound default has no type
            load.wait_more(50)
        assert daemon.process.poll() is None
        daemon.wait_answers()
        kept.sendall(b"after\n")
        assert read_line(kept) == "after"
    assert (load.outcome.refused, load.outcome.broken) == ([], [])


def test_the_commands_say_what_runs(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write_web(manifests)
    daemon = proxyd(workers=2)
    wait_serving(daemon)
    shown = daemon.cli("status")
    assert shown.returncode == 0
    assert f"pid {daemon.pid}" in shown.stdout
    assert daemon.status()["pid"] == daemon.pid
    assert sorted(each["pid"] for each in daemon.status()["workers"]) == daemon.worker_pids()
    assert [(each["namespace"], each["name"]) for each in daemon.cli_get("services")] == [("default", "web")]
    assert [each["address"] for each in daemon.cli_get("endpoints")] == [
        f"10.244.0.{n}:9376" for n in (11, 12, 13)
    ]
    addresses = {(each["address"], each["port"], each["state"]) for each in daemon.cli_get("listeners")}
    assert {(VIP, 80, "Serving"), (NODE_IP, 30080, "Serving"), (EXTERNAL_IP, 80, "Serving")} <= addresses
    for noun in ("services", "endpoints", "listeners"):
        table = daemon.cli("get", noun)
        assert table.returncode == 0
        assert "default" in table.stdout
        assert len(table.stdout.splitlines()) > 1
    assert daemon.stop() == 0
    for words in (("status",), ("get", "services")):
        gone = daemon.cli(*words)
        assert gone.returncode == 4
        assert gone.stdout == ""
        assert len(gone.stderr.strip().splitlines()) == 1


def test_the_socket_is_for_owner_and_group(lab: Lab, manifests: Path, proxyd: Run) -> None:
    assert proxyd().socket.stat().st_mode & 0o777 == 0o660


def test_the_access_log_has_every_connection(lab: Lab, folder: Path, manifests: Path, proxyd: Run) -> None:
    write_web(manifests)
    path = folder / "access.log"
    daemon = proxyd(flags=("--access-log", str(path)))
    wait_serving(daemon)
    assert many(lab.outside, NODE_IP, 30080, 20).total == 20
    wait_for(lambda: len(lines_of(path)) >= 20, "20 lines")
    lines = lines_of(path)
    assert len(lines) == 20
    for line in lines:
        for part in (OUTSIDE_IP, f"{NODE_IP}:30080", "default/web", "10.244.0.1"):
            assert part in line


def test_what_cannot_run_says_so_in_one_line(lab: Lab, folder: Path, manifests: Path) -> None:
    for flags in (("--workers", "many"), ("--vip-mode", "magic"), ("--nodeport-addresses", "203.0.113.1/99")):
        with_flag = Proxyd(lab.node, folder, manifests, flags=flags)
        try:
            assert with_flag.start(wait=False).wait() in {2, 3}
            assert flags[0] in with_flag.log()
            assert "Traceback" not in with_flag.log()
        finally:
            with_flag.__exit__()


def test_workers_have_no_capabilities(manifests: Path, proxyd: Run) -> None:
    write_web(manifests)
    daemon = proxyd(workers=2)
    wait_serving(daemon)
    for pid in daemon.worker_pids():
        status = Path(f"/proc/{pid}/status").read_text()
        sets = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Cap"))
        assert {sets[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}
