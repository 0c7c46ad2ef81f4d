"""The service: what it tells its manager, and how systemd itself runs the unit."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.clients import ask, connect, read_line
from tests.support.daemon import Proxyd
from tests.support.manifests import endpoints, endpoints_at, service, write
from tests.support.netlab import NODE_IP, POD_PORT, Lab, Namespace, routes_and_rules
from tests.support.paths import REPOSITORY
from tests.support.service_manager import Manager
from tests.support.systemd_machine import POD_IP, Machine, real_root
from tests.support.waiting import DEADLINE, wait_for

UNIT = "/usr/local/lib/systemd/system/proxyd.service"
VIP = "10.96.0.10"
OTHER_VIP = "10.96.0.11"
Run = Callable[..., Proxyd]
NOT_ROOT = "--reuid=45678", "--regid=45678", "--clear-groups"
# What the unit gives; reading any folder besides, as this checkout may lie in one that is root's own.
ONLY = "-all,+net_admin,+net_bind_service,+dac_read_search"


@pytest.fixture
def manager(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with Manager(folder) as made:
        monkeypatch.setenv("NOTIFY_SOCKET", made.path)
        yield made


def start(lab: Lab, folder: Path, manifests: Path, **options: object) -> Proxyd:
    """A daemon of which nothing is known yet but that it was started."""
    return Proxyd(lab.node, folder, manifests, **options).start(wait=False)  # type: ignore[arg-type]  # as it takes them


def test_ready_is_said_when_everything_is_open(
    lab: Lab, folder: Path, manifests: Path, manager: Manager
) -> None:
    write(manifests / "web.yaml", service("web", VIP, node_port=30080), endpoints("web", 1))
    write(manifests / "other.yaml", service("other", OTHER_VIP), endpoints("other", 2))
    write(manifests / "wrong.yaml", "kind: Service\napiVersion: v1\nmetadata: {name: 7}\n")
    with lab.node.listen(NODE_IP, 30080):
        daemon = start(lab, folder, manifests)
        try:
            manager.wait("READY", "1")
            # No waiting here: it was said that they are open.
            assert ask(lab.client, VIP, 80) == "pod-1"
            assert ask(lab.client, OTHER_VIP, 80) == "pod-2"
            first = manager.read()[0]
            assert set(first) == {"READY", "STATUS"}
            assert re.fullmatch(
                r"serving: 2 services, \d+ listeners, 1 failed, \d+ errors? in manifests", first["STATUS"]
            )
            (manifests / "wrong.yaml").unlink()
            (manifests / "other.yaml").unlink()
            manager.wait("STATUS", r"serving: 1 service, \d+ listeners, 1 failed")
        finally:
            daemon.__exit__()


def test_a_reload_ends_when_what_was_read_is_in_force(
    lab: Lab, folder: Path, manifests: Path, manager: Manager
) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = start(lab, folder, manifests)
    try:
        manager.wait("READY", "1")
        before = time.monotonic_ns() // 1000
        write(manifests / "other.yaml", service("other", OTHER_VIP), endpoints("other", 2))
        daemon.signal(signal.SIGHUP)
        reloading = manager.wait("RELOADING", "1")
        assert before <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        ready = manager.wait("READY", "1", count=2)
        assert ready["STATUS"].startswith("serving: 2 services, ")
        assert ask(lab.client, OTHER_VIP, 80) == "pod-2"
        daemon.signal(signal.SIGHUP)  # nothing changed: it ends all the same
        manager.wait("READY", "1", count=3)
    finally:
        daemon.__exit__()


def test_stopping_is_said_and_the_time_it_takes_asked_for(
    lab: Lab, folder: Path, manifests: Path, manager: Manager
) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    clean = routes_and_rules(lab.node)
    daemon = start(lab, folder, manifests, flags=("--drain-timeout", "70s"))
    try:
        manager.wait("READY", "1")
        with connect(lab.client, VIP, 80) as sock:
            sock.sendall(b"echo\nbefore\n")
            assert read_line(sock) == "before"
            daemon.signal(signal.SIGTERM)
            stopping = manager.wait("STOPPING", "1")
            assert 70 < int(stopping["EXTEND_TIMEOUT_USEC"]) / 1e6 < 100
            assert stopping["STATUS"] == "draining: connections may go on for 70 s"
            sock.sendall(b"after\n")
            assert read_line(sock) == "after"
        assert daemon.wait() == 0
        messages = manager.read()
        assert "STOPPING" in messages[-1]  # nothing is said after the last word
        assert routes_and_rules(lab.node) == clean
    finally:
        daemon.__exit__()


def test_the_watchdog_is_fed_while_workers_answer(
    lab: Lab, folder: Path, manifests: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2400000")
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = start(lab, folder, manifests, workers=2)
    try:
        manager.wait("READY", "1")
        wait_for(lambda: manager.fed() >= 5, "to be fed")
        times = [when for when, message in manager.seen if "WATCHDOG" in message]
        assert max(b - a for a, b in itertools.pairwise(times)) < 2.4

        hanging = daemon.worker_pids()[0]
        os.kill(hanging, signal.SIGSTOP)
        told = manager.wait("STATUS", ".*1 of 2 workers do not answer")

        def until_well() -> list[dict[str, str]]:
            """What came from that word on, with the next one that says nothing of workers."""
            came = manager.read()
            came = came[came.index(told) :]
            well = [
                re.fullmatch(r"serving: 1 service, \d+ listeners?", one.get("STATUS", "")) for one in came
            ]
            return came[: 1 + [bool(each) for each in well].index(True)] if any(well) else []

        # It is replaced; the other one goes on.
        wait_for(lambda: hanging not in daemon.worker_pids(), "the hanging worker to be replaced")
        assert not any("WATCHDOG" in message for message in wait_for(until_well, "health"))
        fed = manager.fed()
        wait_for(lambda: manager.fed() > fed + 2, "to be fed again")
        assert ask(lab.client, VIP, 80) == "pod-1"
        assert '"worker does not answer: it is replaced"' in daemon.log()
    finally:
        daemon.__exit__()


def test_it_is_fed_while_it_drains(
    lab: Lab, folder: Path, manifests: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = start(lab, folder, manifests)
    try:
        manager.wait("READY", "1")
        with connect(lab.client, VIP, 80) as sock:
            sock.sendall(b"echo\nbefore\n")
            assert read_line(sock) == "before"
            daemon.signal(signal.SIGTERM)
            manager.wait("STOPPING", "1")
            fed = manager.fed()
            wait_for(lambda: manager.fed() > fed + 3, "to be fed")
        assert daemon.wait() == 0
    finally:
        daemon.__exit__()


def test_a_watchdog_for_another_process_is_left_alone(
    lab: Lab, folder: Path, manifests: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    daemon = start(lab, folder, manifests)
    try:
        manager.wait("READY", "1")
        manager.wait("STATUS", "serving: 0 services, 0 listeners")
        daemon.signal(signal.SIGHUP)
        manager.wait("READY", "1", count=2)
        assert daemon.stop() == 0
        assert manager.fed() == 0
    finally:
        daemon.__exit__()


def test_a_user_with_two_capabilities_may_do_it_all(lab: Lab, folder: Path, manifests: Path) -> None:
    folder.chmod(0o755)
    write(
        manifests / "web.yaml",
        service("web", node_port=30080, externalIPs=["80.11.12.10"]),
        endpoints("web", 1),
    )
    home, runtime = folder / "lib", folder / "run"
    for made in (home, runtime):
        made.mkdir()
        os.chown(made, 45678, 45678)
    clean = routes_and_rules(lab.node)
    command = [
        *("setpriv", *NOT_ROOT, "--no-new-privs"),
        *(f"--inh-caps={ONLY}", f"--ambient-caps={ONLY}", f"--bounding-set={ONLY}"),
        *(sys.executable, "-m", "proxyd", "run", "--manifests", str(manifests), "--workers", "1"),
    ]
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("XDG_")},
        "PYTHONPATH": str(REPOSITORY),
        "STATE_DIRECTORY": str(home),
        "RUNTIME_DIRECTORY": f"{runtime}:/run/other",
    }
    with Manager(folder) as manager:
        env["NOTIFY_SOCKET"] = manager.path
        with lab.node.popen(command, env=env, cwd="/", stdin=subprocess.DEVNULL) as process:
            try:
                assert manager.wait("READY", "1")["STATUS"].startswith("serving: 1 service, ")
                status = Path(f"/proc/{process.pid}/status").read_text()
                assert re.search(r"^Uid:\s45678\s45678", status, re.MULTILINE)
                # The defaults of one who may route, whatever the user; the folders of the unit.
                (route,) = lab.node.run("ip", "route", "show", "table", "local", "proto", "112").splitlines()
                vip = route.split()[1]
                assert vip.startswith("10.96.")
                assert (home / "state.json").exists()
                assert (runtime / "admin.sock").is_socket()
                assert "fwmark 0x1000/0x1000 lookup 7112" in lab.node.run("ip", "rule")
                assert f"{vip} ." in lab.node.run("nft", "list", "table", "inet", "proxyd")
                assert ask(lab.client, vip, 80) == "pod-1"
                assert ask(lab.outside, NODE_IP, 30080) == "pod-1"
                assert ask(lab.outside, "80.11.12.10", 80) == "pod-1"
            finally:
                process.terminate()
                assert process.wait(DEADLINE) == 0
    assert routes_and_rules(lab.node) == clean


# The unit


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tarball holds."""
    made = tmp_path_factory.mktemp("tree") / "proxyd"
    build = [sys.executable, str(REPOSITORY / "packaging/build.py"), "--tree", str(made)]
    subprocess.run(build, check=True, timeout=110)
    return made


@pytest.fixture(scope="module")
def machine(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which proxyd was installed, with systemd as its first process."""
    if not real_root():
        pytest.skip("systemd needs a cgroup, which only the machine's root can make")
    folder = tmp_path_factory.mktemp("machine")
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    with Machine(folder, tree) as booted:
        booted.serve("hello\n", POD_PORT)
        yield booted


def put(machine: Machine, name: str, *documents: object) -> None:
    """Write a manifest into /etc/proxyd/manifests."""
    path = write(machine.shared / f"{name}.new", *documents)  # type: ignore[arg-type]  # as it takes them
    path.chmod(0o644)
    machine.ok("cp", f"/shared/{name}.new", f"/etc/proxyd/manifests/{name}.yaml")


@pytest.fixture
def running(machine: Machine) -> Iterator[Machine]:
    """The machine, with the service started anew over one Service."""
    put(machine, "web", service("web"), endpoints_at("web", POD_IP))
    machine.ok("systemctl", "start", "proxyd")
    yield machine
    machine.ok("systemctl", "stop", "proxyd")
    machine.ok("sh", "-c", "rm -f /etc/proxyd/manifests/*.yaml; systemctl reset-failed || true")


def web_vip(machine: Machine) -> str:
    """The clusterIP of the Service web."""
    (row,) = [line for line in machine.ok("proxyd", "get", "services").splitlines() if " web " in line]
    found = re.search(r"10\.96\.\d+\.\d+", row)
    assert found, row
    return found[0]


def test_the_unit_verifies_and_is_well_confined(machine: Machine) -> None:
    assert "systemctl enable --now proxyd" in machine.boot_log
    done = machine.run("systemd-analyze", "verify", "--man=no", UNIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    said = machine.ok("systemd-analyze", "security", "--offline=yes", "--no-pager", UNIT)  # fmt: skip
    exposure = re.search(r"exposure level for proxyd.service: ([\d.]+)", said)
    assert exposure, said
    assert float(exposure[1]) <= 1.8


def test_systemd_runs_it(running: Machine) -> None:
    assert running.show("ActiveState") == "active"
    assert running.show("StatusText") == "serving: 1 service, 1 listener"
    vip = web_vip(running)
    assert running.ask(vip, 80) == "hello\n"
    status = running.ok("cat", f"/proc/{running.show('MainPID')}/status")
    values = {name: value.split() for name, value in re.findall(r"^(\w+):\s(.*)$", status, re.MULTILINE)}
    assert int(values["Uid"][0]) >= 61184  # systemd's range of dynamic users
    assert (
        int(values["CapEff"][0], 16) == 1 << 39 | 1 << 12 | 1 << 10
    )  # CAP_BPF, CAP_NET_ADMIN, CAP_NET_BIND_SERVICE
    assert values["Seccomp"] == ["2"]
    # The guard is there, on a node without /etc/protocols.
    assert vip in running.ok("nft", "list", "table", "inet", "proxyd")
    assert json.loads(running.ok("proxyd", "status", "-o", "json"))["vipListen"] == "parked"
    assert running.show("NFileDescriptorStore") == "3"  # what finds parked listeners outlives a killed daemon
    assert "warning" not in running.log()
    assert running.ok("stat", "-c", "%a %G", "/run/proxyd", "/run/proxyd/admin.sock").splitlines() == [
        "750 proxyd-admin",
        "660 proxyd-admin",
    ]


def test_who_may_ask_it(running: Machine) -> None:
    member = ("setpriv", "--reuid=1000", "--regid=1000", "--groups=997", "--inh-caps=-all")
    other = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--inh-caps=-all")
    assert "default" in running.ok(*member, "proxyd", "get", "services")
    refused = running.run(*other, "proxyd", "get", "services")
    assert refused.returncode == 4
    assert "/run/proxyd/admin.sock" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_systemctl_reload_returns_when_it_is_in_force(running: Machine) -> None:
    pid = running.show("MainPID")
    put(running, "other", service("other", OTHER_VIP), endpoints_at("other", POD_IP))
    running.ok("systemctl", "reload", "proxyd")
    wait_for(lambda: running.show("StatusText") == "serving: 2 services, 2 listeners", "the new status")
    assert running.ask(OTHER_VIP, 80) == "hello\n"
    assert running.show("MainPID") == pid


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_one_that_hangs_or_dies_is_started_again(running: Machine, number: signal.Signals) -> None:
    vip, pid = web_vip(running), running.show("MainPID")
    before = int(running.show("NRestarts"))
    running.kill(number)
    wait_for(
        lambda: (int(running.show("NRestarts")), running.show("ActiveState")) == (before + 1, "active"),
        "a new start",
    )
    assert running.show("MainPID") != pid
    assert running.ask(vip, 80) == "hello\n"
    assert web_vip(running) == vip  # remembered in /var/lib/proxyd


def test_the_vips_of_a_killed_daemon_stay_guarded(running: Machine) -> None:
    """While nothing of proxyd runs, no port of a VIP reaches a daemon that listens at all addresses."""
    vip, before = web_vip(running), int(running.show("NRestarts"))
    with running.watch(vip, 22) as seen:
        wait_for(lambda: len(seen()) > 20, "refusals")
        running.ok("sh", "-c", "systemctl kill --kill-whom=all --signal=KILL proxyd")
        wait_for(
            lambda: (int(running.show("NRestarts")), running.show("ActiveState")) == (before + 1, "active"),
            "a new start",
        )
        count = len(seen())
        wait_for(lambda: len(seen()) > count + 20, "refusals by the next daemon")
    assert set(seen()) == {"refused"}
    assert running.ask(vip, 80) == "hello\n"
    assert running.show("NFileDescriptorStore") == "3"


def test_stopping_leaves_nothing(running: Machine) -> None:
    began = time.monotonic()
    running.ok("systemctl", "stop", "proxyd")
    assert time.monotonic() - began < 25  # the drain: with no connection there is nothing to wait for
    assert (running.show("Result"), running.show("ExecMainStatus")) == ("success", "0")
    assert running.ok("ip", "route", "show", "table", "local", "proto", "112") == ""
    assert running.run("nft", "list", "table", "inet", "proxyd").returncode != 0


def test_wrong_flags_are_not_tried_for_ever(machine: Machine) -> None:
    machine.ok("sh", "-c", "echo 'PROXYD_OPTS=--vip-mode=sideways' >/etc/default/proxyd")
    before = machine.show("NRestarts")
    try:
        assert machine.run("systemctl", "start", "proxyd").returncode != 0
        wait_for(lambda: machine.show("ActiveState") == "failed", "the service to have failed")
        assert (machine.show("ExecMainStatus"), machine.show("NRestarts")) == ("2", before)
        assert "--vip-mode" in machine.log().splitlines()[-1]
    finally:
        machine.ok("sh", "-c", ": >/etc/default/proxyd; systemctl reset-failed || true")


def test_an_installed_proxyd_runs_and_is_removed(tree: Path, folder: Path) -> None:
    destination = folder / "root"
    env = {**os.environ, "DESTDIR": str(destination), "PREFIX": str(folder / "opt"), "PYTHON": sys.executable}
    subprocess.run([tree / "install.sh"], env=env, check=True, timeout=DEADLINE)
    installed = destination / str(folder / "opt").lstrip("/")
    assert (installed / "lib/systemd/system/proxyd.service").read_text().count(
        f"{folder}/opt/bin/proxyd run"
    ) == 1
    mine = destination / "etc/default/proxyd"
    mine.write_text("PROXYD_OPTS=-v\n")
    # Over itself, as an upgrade is.
    subprocess.run([tree / "install.sh"], env=env, check=True, timeout=DEADLINE)
    assert mine.read_text() == "PROXYD_OPTS=-v\n"
    installed.rename(folder / "opt")
    with Namespace("installed") as namespace:  # without any network
        said = namespace.run(str(folder / "opt/bin/proxyd"), "version")
    assert said.startswith("proxyd ")
    (folder / "opt").rename(installed)
    subprocess.run([tree / "uninstall.sh"], env=env, check=True, timeout=DEADLINE)
    left = sorted(str(path.relative_to(destination)) for path in destination.rglob("*") if path.is_file())
    assert left == ["etc/default/proxyd", "etc/proxyd/manifests/README"]


def test_another_python_is_refused(tree: Path, folder: Path) -> None:
    wrong = folder / "python3.9"
    wrong.write_text("#!/bin/sh\necho python3.9 /usr/bin/python3.9\n")
    wrong.chmod(0o755)
    env = {**os.environ, "DESTDIR": str(folder / "root"), "PYTHON": str(wrong)}
    done = subprocess.run(
        [tree / "install.sh"], env=env, check=False, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 1
    assert done.stderr.startswith("install.sh: error: this build is for python3.")
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / "root").exists()
