"""The control process under pressure: signals at bad moments, too few descriptors, a socket that is taken away."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.clients import ask, many
from tests.support.daemon import COMMAND, Proxyd, is_alive
from tests.support.manifests import endpoints, service, text, write
from tests.support.netlab import Lab, routes_and_rules
from tests.support.waiting import DEADLINE, wait_for

VIP = "10.96.0.10"

Run = Callable[..., Proxyd]


def vip(number: int) -> str:
    return f"10.96.{1 + number // 200}.{1 + number % 200}"


def test_hangups_that_come_at_once_are_few_reloads(
    lab: Lab, folder: Path, manifests: Path, proxyd: Run
) -> None:
    for number in range(1000):  # so that reading them again takes a while
        write(
            manifests / f"quiet-{number}.yaml",
            service(f"quiet-{number}", type="ExternalName", externalName="example.org"),
        )
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = proxyd(workers=1)
    daemon.wait_listener(VIP, 80)
    for _ in range(300):
        daemon.signal(signal.SIGHUP)
        time.sleep(0.0002)  # each is seen by itself
    # The last of them counts as much as the first.
    done = daemon.cli("reload", timeout=DEADLINE)
    assert "1,001 services" in done.stdout
    # How many there were depends on how fast the machine reads; that none is added to one under way and one that waits,
    # tests/unit/test_reloading.py says.
    readings = daemon.log().count('"event":"reloading"')
    assert 1 < readings <= 301
    # None is left but one that was asked for last, and the one of this order.
    daemon.cli("reload", timeout=DEADLINE)
    assert daemon.log().count('"event":"reloading"') <= readings + 2
    assert many(lab.client, VIP, 80, 3).answered == {"pod-1": 3}


def test_what_does_not_fit_into_the_descriptors_is_opened_when_it_does(
    lab: Lab, folder: Path, manifests: Path
) -> None:
    for number in range(300):
        write(
            manifests / f"web-{number:03}.yaml",
            service(f"web-{number:03}", vip(number)),
            endpoints(f"web-{number:03}", 1),
        )
    daemon = Proxyd(lab.node, folder, manifests, before=("prlimit", "--nofile=400:400"))
    with daemon:
        states = [listener.state for listener in daemon.listeners()]
        assert len(states) == 300
        assert 100 < states.count("Serving") < 300
        failed = [listener for listener in daemon.listeners() if listener.state == "Failed"]
        assert len(failed) == 300 - states.count("Serving")
        assert {listener.detail for listener in failed} == {
            "out of file descriptors: raise LimitNOFILE= of the unit (or `ulimit -n`)"
        }
        assert daemon.log().count("listeners failed") == 1
        served = next(listener for listener in daemon.listeners() if listener.state == "Serving")
        assert ask(lab.client, served.ip, 80) == "pod-1"
        for number in range(0, 300, 2):
            (manifests / f"web-{number:03}.yaml").unlink()
        daemon.wait_listeners(
            lambda them: len(them) == 150 and all(listener.state == "Serving" for listener in them),
            "those that are left to be served",
        )
        assert ask(lab.client, vip(299), 80) == "pod-1"
        assert "Traceback" not in daemon.log()


def test_a_removed_admin_socket_comes_back(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = proxyd(workers=1, flags=("--sync-period", "1s"))
    daemon.wait_listener(VIP, 80)
    daemon.socket.unlink()
    wait_for(lambda: daemon.try_get("services"), "an answer on a new socket")
    assert daemon.log().count("the admin socket was removed") == 1
    assert daemon.stop() == 0
    assert not daemon.socket.exists()


def test_the_log_says_where_in_a_file_a_problem_is_as_check_does(
    lab: Lab, manifests: Path, proxyd: Run
) -> None:
    path = write(manifests / "web.yaml", service("web", VIP))
    daemon = proxyd(workers=1)
    daemon.wait_listener(VIP, 80, "NoEndpoints")
    checked = subprocess.run(
        [*COMMAND, "check", path], capture_output=True, text=True, check=False, timeout=DEADLINE
    )
    (said,) = [line for line in checked.stdout.splitlines() if "warning: " in line]
    assert said.startswith(f"{path}:")
    assert said.split(":")[1].isdecimal()
    assert said in daemon.log()


def test_an_end_that_is_ordered_while_manifests_are_read_comes_soon(
    lab: Lab, folder: Path, manifests: Path
) -> None:
    documents = [
        document
        for number in range(4000)
        for document in (service(f"web-{number}", vip(number)), endpoints(f"web-{number}", 1))
    ]
    (manifests / "all.yaml").write_text(text(*documents))
    untouched = routes_and_rules(lab.node)
    daemon = Proxyd(lab.node, folder, manifests, workers=2)
    try:
        daemon.start(wait=False)
        wait_for(daemon.socket.exists, "the admin socket")
        children = daemon.children()
        daemon.signal(signal.SIGHUP)  # does not end it
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert not daemon.socket.exists()
        assert not any(is_alive(pid) for pid in children)  # nor the process that read the second half
        assert routes_and_rules(lab.node) == untouched
        assert "Traceback" not in daemon.log()
    finally:
        daemon.__exit__()
