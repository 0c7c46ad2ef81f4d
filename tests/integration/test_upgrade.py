"""`proxyd upgrade`: another program goes on in the same process, and no client notices."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from clients import Load, connect, many, read_line, refused, wait_for
from daemon import Proxyd, is_alive
from manifests import endpoints, service, write
from netlab import Lab, routes_and_rules

VIP = "10.96.0.10"

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
    done = daemon.cli("upgrade", timeout=100)
    assert done.returncode == 0, f"{done.stderr}\n{daemon.log()}"
    assert done.stdout.startswith("proxyd ")
    now = daemon.status()
    assert now["pid"] == pid
    assert now["started"] > before


@pytest.mark.timeout(300)
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
    assert daemon.status()["leavingWorkers"] == []
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
    done = daemon.cli("upgrade", timeout=100)
    assert done.returncode == 1
    assert "the new program would not start: " in done.stderr
    assert "no such file or folder" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (daemon.worker_pids(), daemon.status()["started"]) == (workers, before)
    assert many(lab.client, VIP, 80, 5).answered == {"pod-1": 5}
