"""`proxyd upgrade`: another program goes on in the same process, and no client notices."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.support import dns
from tests.support.clients import Load, ask, connect, lines_of, many, read_line, refused
from tests.support.clusterlab import NODE_1, Cluster, pod
from tests.support.daemon import Proxyd, is_alive
from tests.support.manifests import endpoints, service, write
from tests.support.netlab import EXTERNAL_IP, NODE_IP, Lab, routes_and_rules
from tests.support.service_manager import Manager
from tests.support.waiting import DEADLINE, wait_for

VIP = "10.96.0.10"

# Has a program that takes over wait, before it does anything, until a file `go` is there.
WAITS = """
import os, pathlib, time
here = pathlib.Path(__file__).parent
if os.environ.get("PROXYD_HANDOVER", "").isdecimal():
    (here / "waits").touch()
    while not (here / "go").exists():
        time.sleep(0.01)
"""

Run = Callable[..., Proxyd]


def echoes(sock: socket.socket, text: str) -> bool:
    sock.sendall(f"{text}\n".encode())
    return read_line(sock) == text


def echo(stack: ExitStack, lab: Lab) -> socket.socket:
    """A connection that answers to every line."""
    sock = stack.enter_context(connect(lab.client, VIP, 80))
    sock.sendall(b"echo\n")
    assert echoes(sock, "first")
    return sock


def upgrade(daemon: Proxyd) -> None:
    pid, before = daemon.pid, daemon.status()["started"]
    done = daemon.cli("upgrade", timeout=DEADLINE)
    assert done.returncode == 0, f"{done.stderr}\n{daemon.log()}"
    assert done.stdout.startswith("proxyd ")
    now = daemon.status()
    assert now["pid"] == pid
    assert now["started"] > before


def test_five_upgrades_refuse_nobody_and_end_no_connection(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, node_port=30080), endpoints("web", 1, 2, 3))
    untouched = routes_and_rules(lab.node)
    daemon = proxyd(workers=2)
    daemon.wait_listener(VIP, 80)
    with ExitStack() as stack:
        kept = [echo(stack, lab)]
        load = stack.enter_context(Load(lab.client, VIP, 80, clients=4))
        for _ in range(5):
            load.wait_more(20)
            upgrade(daemon)
            kept.append(echo(stack, lab))
        load.wait_more(20)
        assert all(echoes(sock, "after all") for sock in kept)
        shown = [entry for entry in daemon.get("connections") if entry["state"] == "established"]
        assert {sock.getsockname()[1] for sock in kept} <= {
            int(entry["client"].rpartition(":")[2]) for entry in shown
        }
        assert daemon.status()["leavingWorkers"]
    assert load.outcome.refused == []
    assert load.outcome.broken == []
    # With their last connection the workers of before have ended.
    wait_for(lambda: len(daemon.worker_pids()) == 2, "the old workers to be gone")
    wait_for(lambda: daemon.status()["leavingWorkers"] == [], "control to have noticed")
    assert daemon.stop() == 0
    assert routes_and_rules(lab.node) == untouched


def test_a_signal_upgrades_and_a_stop_ends_old_workers_too(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    untouched = routes_and_rules(lab.node)
    daemon = proxyd(workers=1, flags=("--drain-timeout", "0.2s"))
    daemon.wait_listener(VIP, 80)
    (old,) = daemon.worker_pids()
    with ExitStack() as stack:
        kept = echo(stack, lab)
        before = daemon.status()["started"]
        daemon.signal(signal.SIGUSR2)
        wait_for(lambda: "goes on from an earlier program" in daemon.log(), "the new program")
        daemon.wait_answers()
        assert daemon.status()["started"] > before
        assert echoes(kept, "after")
        daemon.signal(signal.SIGHUP)  # is not lost on the new program
        assert echoes(kept, "and after that")
        assert daemon.stop() == 0
        assert not is_alive(old)
        assert routes_and_rules(lab.node) == untouched


def test_a_removed_services_connections_drain_after_an_upgrade(
    lab: Lab, manifests: Path, proxyd: Run
) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = proxyd(workers=1)
    daemon.wait_listener(VIP, 80)
    with ExitStack() as stack:
        kept = echo(stack, lab)
        upgrade(daemon)
        (manifests / "web.yaml").unlink()
        daemon.wait_listeners(lambda all_of_them: not all_of_them, "no listener")
        assert refused(lab.client, VIP, 80)
        assert echoes(kept, "the Service is gone, its address is not")
    wait_for(lambda: VIP not in str(routes_and_rules(lab.node)), "the VIP to go with the last connection")


def test_a_program_that_would_not_start_takes_nothing_over(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = proxyd(workers=1)
    daemon.wait_listener(VIP, 80)
    workers, before = daemon.worker_pids(), daemon.status()["started"]
    shutil.move(manifests, manifests.with_name("away"))
    done = daemon.cli("upgrade", timeout=DEADLINE)
    assert done.returncode == 1
    assert "the new program would not start: " in done.stderr
    assert "no such file or folder" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (daemon.worker_pids(), daemon.status()["started"]) == (workers, before)
    assert many(lab.client, VIP, 80, 5).answered == {"pod-1": 5}


def test_a_program_of_another_handover_takes_nothing_over(
    lab: Lab, folder: Path, manifests: Path, proxyd: Run
) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = proxyd(workers=1)
    daemon.wait_listener(VIP, 80)
    workers, before = daemon.worker_pids(), daemon.status()["started"]
    # It is found before the real one: the daemon was started as a module, from this folder.
    other = folder / "proxyd"
    other.mkdir()
    (other / "__init__.py").touch()
    (other / "__main__.py").write_text("print('proxyd-handover 0')")
    done = daemon.cli("upgrade", timeout=DEADLINE)
    shutil.rmtree(other)
    assert done.returncode == 1
    assert "handovers are of different versions: restart the daemon" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (daemon.worker_pids(), daemon.status()["started"]) == (workers, before)
    assert many(lab.client, VIP, 80, 5).answered == {"pod-1": 5}


def test_orders_that_come_before_the_new_program_hears_them_are_carried_out(
    lab: Lab, folder: Path, manifests: Path, proxyd: Run
) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    untouched = routes_and_rules(lab.node)
    early = folder / "early"
    early.mkdir()
    (early / "sitecustomize.py").write_text(WAITS)
    daemon = proxyd(workers=1, path=(early,))
    daemon.wait_listener(VIP, 80)
    (old,) = daemon.worker_pids()
    with ExitStack() as stack:
        kept = echo(stack, lab)
        daemon.signal(signal.SIGUSR2)
        wait_for((early / "waits").exists, "the new program to begin")
        daemon.signal(signal.SIGHUP)
        daemon.signal(signal.SIGTERM)
        (early / "go").touch()
        wait_for(lambda: '"stopping"' in daemon.log(), "the order to be heard")
        wait_for(lambda: refused(lab.client, VIP, 80), "the listener to be closed")
        # The connection has its time; with it the program ends.
        assert echoes(kept, "it drains")
    assert daemon.wait() == 0
    assert not is_alive(old)
    assert routes_and_rules(lab.node) == untouched


def test_nodeports_external_ips_and_udp_go_on(lab: Lab, manifests: Path, proxyd: Run) -> None:
    web = service("web", VIP, node_port=30080, externalIPs=[EXTERNAL_IP])
    write(manifests / "web.yaml", web, endpoints("web", 1))
    write(manifests / "dns.yaml", dns.dns_service(), dns.dns_endpoints(1))
    daemon = proxyd(workers=2)
    places = [(lab.client, VIP, 80), (lab.outside, NODE_IP, 30080), (lab.outside, EXTERNAL_IP, 80)]
    for _, ip, port in places:
        daemon.wait_listener(ip, port)
    before = routes_and_rules(lab.node)
    with ExitStack() as stack:
        stack.enter_context(dns.programs(dns.echo(lab.pods[0])))
        wait_for(lambda: dns.answers(lab.client, dns.VIP), "the resolver")
        flow = stack.enter_context(lab.client.socket(kind=socket.SOCK_DGRAM))
        flow.settimeout(DEADLINE)
        flow.connect((dns.VIP, 53))
        flow.send(b"before")
        assert flow.recv(100) == b"before"
        loads = [stack.enter_context(Load(*place, clients=1)) for place in places]
        for load in loads:
            load.wait_more(5)
        upgrade(daemon)
        flow.send(b"after")
        assert flow.recv(100) == b"after"
        for load in loads:
            load.wait_more(5)
        assert routes_and_rules(lab.node) == before
    assert [load.outcome.refused + load.outcome.broken for load in loads] == [[], [], []]


def test_the_manager_hears_of_it_and_an_old_worker_that_hangs_ends(
    lab: Lab, folder: Path, manifests: Path, proxyd: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    with ExitStack() as stack:
        manager = stack.enter_context(Manager(folder))
        monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
        daemon = proxyd(workers=1)
        manager.wait("READY", "1")
        (old,) = daemon.worker_pids()
        kept = echo(stack, lab)
        upgrade(daemon)
        manager.wait("RELOADING", "1")
        manager.wait("READY", "1", count=2)
        # The process is the same one: the manager need not be told of another.
        assert not any("MAINPID" in message for message in manager.read())
        assert daemon.status()["leavingWorkers"] == [old]
        os.kill(old, signal.SIGSTOP)
        wait_for(lambda: old not in daemon.worker_pids(), "the hanging worker to end")
        with suppress(ConnectionResetError):
            assert kept.recv(1) == b""
        assert f'"pid":{old}' in next(line for line in daemon.log().splitlines() if "does not answer" in line)
        assert ask(lab.client, VIP, 80) == "pod-1"


def test_children_that_nobody_waits_for_leave_no_zombie(lab: Lab, manifests: Path, folder: Path) -> None:
    """As of a program that nft was running for when the next one took its place."""
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    child = folder / "child"
    # The shell becomes the daemon, and its child the daemon's.
    script = f"sh -c 'echo $$ >{child}; while [ -e {child} ]; do sleep 0.05; done' & exec \"$@\""
    daemon = Proxyd(lab.node, folder, manifests, before=("sh", "-c", script, "sh"))
    try:
        daemon.start()
        (line,) = wait_for(lambda: lines_of(child), "the child")
        assert int(line) in daemon.children()
        child.unlink()
        wait_for(lambda: int(line) not in daemon.children(), "the child to be gone, not a zombie")
    finally:
        child.unlink(missing_ok=True)
        daemon.__exit__()


def test_while_the_api_server_is_away_the_old_workers_go_on(lab: Lab, folder: Path) -> None:
    with Cluster(lab, folder) as cluster:
        cluster.add_nodes()
        cluster.serve("web", VIP, pod(1))
        daemon = cluster.proxyd(NODE_1)
        try:
            daemon.start().wait_listener(VIP, 80)
            (old,) = daemon.worker_pids()
            cluster.kill()
            with Load(lab.client, VIP, 80) as load:
                daemon.signal(signal.SIGUSR2)
                wait_for(lambda: "goes on from an earlier program" in daemon.log(), "the new program")
                wait_for(
                    lambda: (daemon._ask("status") or {}).get("phase") == "starting", "the new one to answer"
                )
                load.wait_more(20)
                assert is_alive(old)
                cluster.start()
                cluster.endpoints("web", pod(2))
                wait_for(lambda: load.outcome.answered["pod-2"] > 5, "the new program to serve")
                wait_for(lambda: old not in daemon.worker_pids(), "the old worker to end")
            assert load.outcome.refused + load.outcome.broken == []
        finally:
            daemon.__exit__()
