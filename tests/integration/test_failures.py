"""What fails beside it does not fail a service: dead endpoints, changes under load, conflicts, addresses in use."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.clients import (
    Load,
    Outcome,
    answer,
    answers,
    ask,
    connect,
    many,
    one,
    read_line,
    records,
    refused,
)
from tests.support.daemon import Proxyd
from tests.support.manifests import endpoints, endpoints_at, service, write
from tests.support.netlab import EXTERNAL_IP, NODE_IP, Lab, Namespace, pod_ip
from tests.support.waiting import DEADLINE, wait_for

VIP = "10.96.0.10"
OTHER_VIP = "10.96.0.20"

Run = Callable[..., Proxyd]


def at_once(namespace: Namespace, ip: str, port: int, count: int, clients: int) -> Outcome:
    """Make connections, `clients` at a time."""
    outcome = Outcome()
    with ThreadPoolExecutor(clients) as pool:
        for _ in range(count):
            pool.submit(one, outcome, namespace, ip, port)
    return outcome


def test_a_dead_endpoint_fails_nobody_and_slows_only_its_own(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1, 2, 3))
    access = manifests.parent / "access.log"
    proxyd(flags=("--access-log", str(access))).wait_listener(VIP, 80)
    healthy = at_once(lab.client, VIP, 80, 300, clients=10)
    assert healthy.total == 300
    assert len(records(access, 300)) == 300
    lab.blackhole_pod(3)
    outcome = at_once(lab.client, VIP, 80, 300, clients=10)
    assert (outcome.refused, outcome.broken) == ([], [])
    assert set(outcome.answered) == {"pod-1", "pod-2"}
    assert outcome.total == 300
    # At most the third that was meant for the dead endpoint tried it, for one attempt's time; the others did not.
    attempts = [record["attempts"] for record in records(access, 600)[300:]]
    waited = sum(count > 1 for count in attempts)
    medians = [each.median("pod-1", "pod-2") * 1000 for each in (healthy, outcome)]
    print(f"median {medians[0]:.2f} ms healthy, {medians[1]:.2f} ms with one dead; {waited} waited")
    assert 1 <= waited <= 110
    assert max(attempts) < 4


def test_without_a_live_endpoint_the_client_is_told(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints_at("web", "10.244.0.77"))
    proxyd().wait_listener(VIP, 80)
    # Nobody has that address, or listens on the port: the client is told, and does not hang.
    with pytest.raises(ConnectionError):
        ask(lab.client, VIP, 80, timeout=DEADLINE)


def test_an_endpoint_that_refuses_is_passed_over(lab: Lab, manifests: Path, proxyd: Run) -> None:
    # The client pod has no server: it refuses.
    write(manifests / "web.yaml", service("web", VIP), endpoints_at("web", pod_ip(1), "10.244.0.100"))
    daemon = proxyd()
    daemon.wait_listener(VIP, 80)
    outcome = many(lab.outside, VIP, 80, 50)
    assert outcome.answered == {"pod-1": 50}
    wait_for(lambda: "Connection refused" in daemon.log(), "a line about the endpoint")
    assert daemon.stop() == 0
    assert "no answer to connect" not in daemon.log()  # no attempt waited for a time-out


@pytest.mark.parametrize("workers", [1, 2])
def test_endpoints_change_a_hundred_times_a_second(
    lab: Lab, manifests: Path, proxyd: Run, workers: int
) -> None:
    sets = itertools.cycle([(1, 2), (2, 3), (1, 3), (1, 2, 3), (2,)])
    write(manifests / "web.yaml", service("web", VIP))
    change = manifests / "endpoints.yaml"
    write(change, endpoints("web", 1, 2, 3))
    daemon = proxyd(workers=workers)
    daemon.wait_listener(VIP, 80)
    with connect(lab.client, VIP, 80) as kept, Load(lab.client, VIP, 80) as load:
        kept.sendall(b"echo\nbefore\n")
        assert read_line(kept) == "before"
        load.wait_more(20)
        begin = time.monotonic()
        for number in range(400):
            write(change, endpoints("web", *next(sets)))
            time.sleep(max(0.0, begin + (number + 1) / 100 - time.monotonic()))
        took = time.monotonic() - begin
        load.wait_more(20)
        kept.sendall(b"after\n")
        assert read_line(kept) == "after"
    print(f"400 changes in {took:.1f} s, {load.outcome.total} connections")
    assert (load.outcome.refused, load.outcome.broken) == ([], [])
    assert set(load.outcome.answered) == {"pod-1", "pod-2", "pod-3"}
    # The last change is in force.
    write(change, endpoints("web", 3))
    wait_for(lambda: set(many(lab.client, VIP, 80, 4).answered) == {"pod-3"}, "only pod-3 answers")


def test_a_removed_service_drains(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, node_port=30080), endpoints("web", 1))
    write(manifests / "other.yaml", service("other", OTHER_VIP), endpoints("other", 2))
    daemon = proxyd()
    daemon.wait_listener(VIP, 80)
    daemon.wait_listener(NODE_IP, 30080)
    with connect(lab.client, VIP, 80) as by_vip, connect(lab.outside, NODE_IP, 30080) as by_node_port:
        for sock in (by_vip, by_node_port):
            sock.sendall(b"echo\nbefore\n")
            assert read_line(sock) == "before"
        (manifests / "web.yaml").unlink()
        wait_for(lambda: not answers(lab.client, VIP, 80), "the VIP to close")
        wait_for(lambda: refused(lab.outside, NODE_IP, 30080), "the NodePort to close")
        for text in (b"after\n", b"and after\n"):
            for sock in (by_vip, by_node_port):
                sock.sendall(text)
                assert read_line(sock) == text.decode().strip()
        assert ask(lab.client, OTHER_VIP, 80) == "pod-2"
        assert daemon.find(OTHER_VIP, 80)
        assert not daemon.find(VIP, 80)
    # With its last connection the address is gone from the node as well.
    wait_for(
        lambda: VIP not in lab.node.run("ip", "route", "show", "table", "local"), "the VIP's route to go"
    )


def test_draining_has_an_end(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = proxyd(flags=("--drain-timeout", "1s"))
    daemon.wait_listener(VIP, 80)
    with connect(lab.client, VIP, 80, timeout=DEADLINE) as sock:
        sock.sendall(b"echo\nbefore\n")
        assert read_line(sock) == "before"
        begin = time.monotonic()
        (manifests / "web.yaml").unlink()
        with suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        assert 0.5 < time.monotonic() - begin < 25  # what it would be without the flag


def test_relays_from_before_the_endpoints_were_away_drain_too(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = proxyd(flags=("--drain-timeout", "1s"))
    daemon.wait_listener(VIP, 80)
    with connect(lab.client, VIP, 80, timeout=DEADLINE) as sock:
        sock.sendall(b"echo\nbefore\n")
        assert read_line(sock) == "before"
        write(manifests / "web.yaml", service("web", VIP), endpoints("web"))
        daemon.wait_listener(VIP, 80, "NoEndpoints")
        write(manifests / "web.yaml", service("web", VIP), endpoints("web", 2))
        daemon.wait_listener(VIP, 80)
        sock.sendall(b"meanwhile\n")
        assert read_line(sock) == "meanwhile"
        begin = time.monotonic()
        (manifests / "web.yaml").unlink()
        with suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        assert 0.5 < time.monotonic() - begin < 25


def test_the_address_of_a_removed_service_with_affinity_goes(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, sessionAffinity="ClientIP"), endpoints("web", 1))
    daemon = proxyd(workers=2)  # only one of them has the listener
    daemon.wait_listener(VIP, 80)
    assert ask(lab.client, VIP, 80) == "pod-1"
    (manifests / "web.yaml").unlink()
    wait_for(
        lambda: VIP not in lab.node.run("ip", "route", "show", "table", "local"), "the VIP's route to go"
    )


def test_a_removed_service_comes_back_while_it_drains(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = proxyd()
    daemon.wait_listener(VIP, 80)
    with connect(lab.client, VIP, 80) as sock:
        sock.sendall(b"echo\nbefore\n")
        assert read_line(sock) == "before"
        (manifests / "web.yaml").unlink()
        wait_for(lambda: not answers(lab.client, VIP, 80), "the VIP to close")
        write(manifests / "web.yaml", service("web", VIP), endpoints("web", 2))
        daemon.wait_listener(VIP, 80)
        assert ask(lab.client, VIP, 80) == "pod-2"
        sock.sendall(b"after\n")
        assert read_line(sock) == "after"


def test_the_first_of_two_services_keeps_the_address(lab: Lab, manifests: Path, proxyd: Run) -> None:
    # By name the second would come first.
    write(manifests / "web.yaml", service("web", VIP, node_port=30080), endpoints("web", 1))
    daemon = proxyd()
    daemon.wait_listener(VIP, 80)
    write(manifests / "api.yaml", service("api", VIP, node_port=30081), endpoints("api", 2))
    loser = daemon.wait_listener(VIP, 80, "Conflict", "default/api")
    assert "default/web" in loser.detail
    assert daemon.wait_listener(VIP, 80, "Serving", "default/web")
    assert many(lab.client, VIP, 80, 10).answered == {"pod-1": 10}
    # What nobody else wants of the second is served.
    daemon.wait_listener(NODE_IP, 30081)
    assert ask(lab.outside, NODE_IP, 30081) == "pod-2"
    with connect(lab.client, VIP, 80) as kept:
        kept.sendall(b"echo\nbefore\n")
        assert read_line(kept) == "before"
        (manifests / "web.yaml").unlink()
        daemon.wait_listener(VIP, 80, "Serving", "default/api")
        assert many(lab.client, VIP, 80, 10).answered == {"pod-2": 10}
        kept.sendall(b"after\n")
        assert read_line(kept) == "after"


def test_a_clock_that_goes_back_takes_no_address_away(lab: Lab, manifests: Path, proxyd: Run) -> None:
    """The first was seen when the clock was years ahead; by times and names the second came before it."""
    ahead = {"created": "2099-01-01T00:00:00.000000Z"}
    state = {"version": 1, "services": {"default/web": ahead}}
    (manifests.parent / "state.json").write_text(json.dumps(state))
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon = proxyd()
    daemon.wait_listener(VIP, 80)
    write(manifests / "api.yaml", service("api", VIP), endpoints("api", 2))
    daemon.wait_listener(VIP, 80, "Conflict", "default/api")
    # One that brings its time with it, from another machine's clock.
    old = service("abc", VIP)
    old["metadata"]["creationTimestamp"] = "2001-01-01T00:00:00Z"
    write(manifests / "abc.yaml", old, endpoints("abc", 3))
    daemon.wait_listener(VIP, 80, "Conflict", "default/abc")
    assert many(lab.client, VIP, 80, 5).answered == {"pod-1": 5}
    # Nor while the first has no endpoints, nor by an upgrade.
    write(manifests / "web.yaml", service("web", VIP), endpoints("web"))
    daemon.wait_listener(VIP, 80, "NoEndpoints", "default/web")
    assert refused(lab.client, VIP, 80)
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon.wait_listener(VIP, 80, "Serving", "default/web")
    assert daemon.cli("upgrade", timeout=100).returncode == 0
    daemon.wait_listener(VIP, 80, "Conflict", "default/abc")
    assert many(lab.client, VIP, 80, 5).answered == {"pod-1": 5}
    # After a restart nothing is open, and what manifests and the state file say decides.
    (manifests / "abc.yaml").unlink()
    daemon.stop()
    daemon.start()
    daemon.wait_listener(VIP, 80, "Serving", "default/web")
    daemon.wait_listener(VIP, 80, "Conflict", "default/api")


def test_a_node_port_that_another_program_holds(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, node_port=30080), endpoints("web", 1))
    write(manifests / "other.yaml", service("other", OTHER_VIP, node_port=30090), endpoints("other", 2))
    with lab.node.listen("0.0.0.0", 30080):
        daemon = proxyd()
        failed = daemon.wait_listener(NODE_IP, 30080, "Failed")
        assert "in use" in failed.detail
        assert len(failed.detail) > len("address already in use")  # it says what to do
        daemon.wait_listener(VIP, 80)
        daemon.wait_listener(NODE_IP, 30090)
        assert ask(lab.client, VIP, 80) == "pod-1"
        assert ask(lab.outside, NODE_IP, 30090) == "pod-2"
    wait_for(lambda: answers(lab.outside, NODE_IP, 30080), "the NodePort is served once it is free")
    daemon.wait_listener(NODE_IP, 30080)
    assert ask(lab.outside, NODE_IP, 30080) == "pod-1"


def test_a_second_daemon_disturbs_nobody(lab: Lab, manifests: Path, folder: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, node_port=30080), endpoints("web", 1))
    daemon = proxyd()
    daemon.wait_listener(VIP, 80)
    second_folder = folder / "second"
    second_folder.mkdir()
    with Load(lab.client, VIP, 80, clients=1) as load:
        second = Proxyd(lab.node, second_folder, manifests)
        try:
            second.start(wait=False)
            # Whether it gives up or reports its listeners as failed is its own affair; the first serves on.
            wait_for(
                lambda: second.process.poll() is not None or second.try_get("listeners"),
                "the second to show itself",
            )
            load.wait_more(100)
            if second.process.poll() is None:
                assert second.stop() == 0
            load.wait_more(100)
        finally:
            second.__exit__()
    assert (load.outcome.refused, load.outcome.broken) == ([], [])


def test_more_listeners_than_descriptors_leave_the_daemon_able_to_act(
    lab: Lab, manifests: Path, proxyd: Run
) -> None:
    documents = [
        document
        for port in range(1000, 1400)
        for document in (service(f"s{port}", VIP, port=port), endpoints(f"s{port}", 1))
    ]
    write(manifests / "all.yaml", *documents)
    daemon = proxyd(before=("prlimit", "--nofile=300:300"))
    listeners = daemon.wait_listeners(lambda found: len(found) == 400, "every listener")
    serving = [each for each in listeners if each.state == "Serving"]
    failed = [each for each in listeners if each.state == "Failed"]
    assert len(serving) > 100
    assert len(failed) == 400 - len(serving)
    assert all("out of file descriptors" in each.detail for each in failed)
    assert daemon.log().count("out of file descriptors") == 1
    (victim,) = daemon.worker_pids()
    os.kill(victim, signal.SIGKILL)
    assert ask(lab.client, VIP, serving[0].port, timeout=DEADLINE) == "pod-1"
    # What is missing is opened as soon as there is room for it.
    write(manifests / "all.yaml", *documents[200:400])
    daemon.wait_listeners(
        lambda found: len(found) == 100 and all(each.state == "Serving" for each in found), "the rest"
    )
    assert ask(lab.client, VIP, 1199) == "pod-1"


def test_what_a_stranger_flushed_is_put_back(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, externalIPs=[EXTERNAL_IP]), endpoints("web", 1))
    write(manifests / "none.yaml", service("none", externalIPs=[EXTERNAL_IP], port=81))
    daemon = proxyd(flags=("--sync-period", "1s"))
    daemon.wait_listener(EXTERNAL_IP, 80)
    daemon.wait_listener(EXTERNAL_IP, 81, "NoEndpoints")
    wait_for(lambda: refused(lab.outside, EXTERNAL_IP, 81), "a refusal")
    tables = lab.node.run("nft", "list", "tables")
    lab.node.run("ip", "route", "flush", "table", "local", "proto", "112")
    lab.node.run("ip", "route", "flush", "table", "7112")
    lab.node.run("nft", "flush", "ruleset")
    wait_for(lambda: answers(lab.client, VIP, 80, timeout=0.5), "the VIP")
    wait_for(lambda: answer(lab.outside, EXTERNAL_IP, 80) == "pod-1", "the externalIP")
    wait_for(lambda: refused(lab.outside, EXTERNAL_IP, 81, within=0.5), "a refusal again")
    wait_for(
        lambda: sorted(lab.node.run("nft", "list", "tables").split()) == sorted(tables.split()), "every table"
    )


def test_failures_without_number_are_few_lines_and_all_counted(
    lab: Lab, manifests: Path, proxyd: Run
) -> None:
    refusing = [1, 2, 3]  # ports that nobody listens at
    ends = endpoints_at("web", "10.244.0.100")
    ends["subsets"] = [{**ends["subsets"][0], "ports": [{"port": port}]} for port in refusing]
    write(manifests / "web.yaml", service("web", VIP), ends)
    daemon = proxyd(workers=2)
    daemon.wait_listener(VIP, 80)
    outcome = at_once(lab.client, VIP, 80, 500, clients=10)
    assert outcome.total == 0
    wait_for(lambda: "Connection refused" in daemon.log(), "a line about the endpoint")
    assert daemon.stop() == 0
    said = [
        line for line in map(json.loads, daemon.log().splitlines()) if "Connection refused" in line["event"]
    ]
    assert len(said) <= 4  # of one kind, whichever endpoint it was
    assert sum(line.get("count", 1) for line in said) == 500 * len(refusing)


def test_listeners_that_fail_alike_are_few_lines(lab: Lab, folder: Path, manifests: Path) -> None:
    documents = [
        document
        for number in range(200)
        for document in (service(f"low{number}", port=80), endpoints(f"low{number}", 1))
    ]
    write(manifests / "low.yaml", *documents)
    with Proxyd(lab.node, folder, manifests, unprivileged=True) as daemon:
        daemon.wait_listeners(
            lambda found: len(found) == 200 and all(each.state == "Failed" for each in found),
            "every listener's failure",
        )
        lines = [json.loads(line) for line in daemon.log().splitlines()]
        assert 1 < len(lines) < 30
        assert any(line.get("more", 0) >= 150 for line in lines)
