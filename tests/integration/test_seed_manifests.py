"""The five seed manifests as they stand: who reaches what by which address, and what stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import answers, ask, many, refused, turned_away
from tests.support.daemon import Proxyd
from tests.support.manifests import MYAPP_PODS, seed_folder, write
from tests.support.netlab import (
    BRIDGE_IP,
    DATABASE_IP,
    EXTERNAL_IP,
    NODE_FAR_IP,
    NODE_IP,
    Lab,
    Namespace,
    pod_ip,
)
from tests.support.waiting import wait_for

PODS = {"pod-1", "pod-2", "pod-3"}
NODE_IPS = (NODE_IP, BRIDGE_IP, NODE_FAR_IP)
NO_FLAGS: tuple[str, ...] = ()


def origins(lab: Lab) -> tuple[Namespace, ...]:
    """Where traffic comes from: the node itself, a pod, an outside host."""
    return (lab.node, lab.client, lab.outside)


@pytest.fixture
def seed(request: pytest.FixtureRequest, lab: Lab, folder: Path) -> Iterator[Proxyd]:
    """A daemon over one seed manifest and the Pods; the test names the manifest, and flags where it wants some."""
    name, flags = request.param
    with Proxyd(lab.node, folder, seed_folder(folder / "manifests", name), flags=flags) as daemon:
        yield daemon


def reaches_every_pod(origin: Namespace, ip: str, port: int) -> bool:
    """Whether connections there are all answered, and by each of the three pods."""
    outcome = many(origin, ip, port, 6)
    assert not outcome.refused, f"{origin.name} to {ip}:{port}: {outcome.refused}"
    assert not outcome.broken, f"{origin.name} to {ip}:{port}: {outcome.broken}"
    return set(outcome.answered) == PODS


@pytest.mark.parametrize("seed", [("my-service.yaml", NO_FLAGS)], indirect=True)
def test_my_service(lab: Lab, seed: Proxyd) -> None:
    vip = seed.vip("default/my-service")
    seed.wait_listener(vip, 80)
    for origin in origins(lab):
        assert reaches_every_pod(origin, vip, 80)
        for ip in NODE_IPS:
            assert refused(origin, ip, 80)
    assert refused(lab.node, "127.0.0.1", 80)
    assert [(each.ip, each.port) for each in seed.listeners()] == [(vip, 80)]


@pytest.mark.parametrize("seed", [("my-service.yaml", NO_FLAGS)], indirect=True)
def test_other_ports_of_a_vip_do_not_reach_the_node(lab: Lab, seed: Proxyd) -> None:
    vip = seed.vip("default/my-service")
    seed.wait_listener(vip, 80)
    with lab.node.listen("0.0.0.0", 22):
        for origin in (lab.client, lab.outside):
            assert turned_away(origin, vip, 22)
            assert refused(origin, vip, 9376)


@pytest.mark.parametrize("seed", [("my-nodeport-service.yaml", NO_FLAGS)], indirect=True)
def test_my_nodeport_service(lab: Lab, seed: Proxyd) -> None:
    vip = seed.vip("default/my-nodeport-service")
    seed.wait_listener(vip, 80)
    seed.wait_listener(NODE_IP, 30036)
    for origin in origins(lab):
        assert reaches_every_pod(origin, vip, 80)
        assert refused(origin, vip, 30036)
        for ip in NODE_IPS:
            assert reaches_every_pod(origin, ip, 30036)
            assert refused(origin, ip, 80)
        for ip in (pod_ip(1), DATABASE_IP, EXTERNAL_IP):
            assert refused(origin, ip, 30036)
    assert reaches_every_pod(lab.node, "127.0.0.1", 30036)


@pytest.mark.parametrize(
    "seed", [("my-nodeport-service.yaml", ("--nodeport-addresses", "127.0.0.0/8"))], indirect=True
)
def test_my_nodeport_service_on_loopback_only(lab: Lab, seed: Proxyd) -> None:
    seed.wait_listener("127.0.0.1", 30036)
    assert reaches_every_pod(lab.node, "127.0.0.1", 30036)
    for origin in origins(lab):
        for ip in NODE_IPS:
            assert refused(origin, ip, 30036)
        assert reaches_every_pod(origin, seed.vip("default/my-nodeport-service"), 80)


@pytest.mark.parametrize("seed", [("external-ip.yaml", NO_FLAGS)], indirect=True)
def test_external_ip(lab: Lab, seed: Proxyd) -> None:
    seed.wait_listener(EXTERNAL_IP, 80)
    vip = seed.vip("default/my-service")
    for origin in origins(lab):
        assert reaches_every_pod(origin, EXTERNAL_IP, 80)
        assert reaches_every_pod(origin, vip, 80)
        # Its other ports are still the real host's, and so are other hosts' addresses.
        assert ask(origin, EXTERNAL_IP, 8080) == "far"
        assert ask(origin, DATABASE_IP, 80) == "far"
        for ip in NODE_IPS:
            assert refused(origin, ip, 80)
    assert seed.stop() == 0
    for origin in origins(lab):
        assert ask(origin, EXTERNAL_IP, 80) == "far"


@pytest.mark.parametrize("seed", [("external-ip.yaml", NO_FLAGS)], indirect=True)
def test_external_ip_without_endpoints(lab: Lab, seed: Proxyd) -> None:
    seed.wait_listener(EXTERNAL_IP, 80)
    pods = seed.folder / "manifests" / "pods.yaml"
    pods.unlink()
    seed.wait_listener(EXTERNAL_IP, 80, "NoEndpoints")
    for origin in origins(lab):
        assert turned_away(origin, EXTERNAL_IP, 80)
        assert ask(origin, EXTERNAL_IP, 8080) == "far"
    write(pods, MYAPP_PODS.read_text())
    seed.wait_listener(EXTERNAL_IP, 80)
    for origin in origins(lab):
        assert reaches_every_pod(origin, EXTERNAL_IP, 80)


@pytest.mark.parametrize("seed", [("external-database.yaml", NO_FLAGS)], indirect=True)
def test_external_database(lab: Lab, seed: Proxyd) -> None:
    vip = seed.vip("default/my-service")
    seed.wait_listener(vip, 80)
    for origin in origins(lab):
        # The far host sees a connection of the node's, whoever asked.
        assert ask(origin, vip, 80, "peer") == f"far {NODE_FAR_IP}"
        for ip in NODE_IPS:
            assert refused(origin, ip, 80)


@pytest.mark.parametrize("seed", [("external-name.yaml", NO_FLAGS)], indirect=True)
def test_external_name_is_shown_and_does_nothing(seed: Proxyd) -> None:
    shown = wait_for(lambda: seed.cli_get("services"), "the ExternalName Service in the list")
    assert [(each["namespace"], each["name"], each["type"]) for each in shown] == [
        ("prod", "my-service", "ExternalName")
    ]
    assert seed.listeners() == []
    assert '"error"' not in seed.log().lower()


def test_a_service_without_endpoints_refuses_at_once(lab: Lab, folder: Path) -> None:
    path = seed_folder(folder / "manifests", "my-nodeport-service.yaml")
    (path / "pods.yaml").unlink()
    with Proxyd(lab.node, folder, path) as daemon:
        vip = daemon.vip("default/my-nodeport-service")
        daemon.wait_listener(vip, 80, "NoEndpoints")
        daemon.wait_listener(NODE_IP, 30036, "NoEndpoints")
        for origin in origins(lab):
            assert refused(origin, vip, 80)
            assert refused(origin, NODE_IP, 30036)
        write(path / "pods.yaml", MYAPP_PODS.read_text())
        daemon.wait_listener(vip, 80)
        for origin in origins(lab):
            assert reaches_every_pod(origin, vip, 80)
            assert reaches_every_pod(origin, NODE_IP, 30036)
        (path / "pods.yaml").unlink()
        daemon.wait_listener(vip, 80, "NoEndpoints")
        assert not answers(lab.client, vip, 80)
        for origin in origins(lab):
            assert refused(origin, vip, 80)
            assert refused(origin, NODE_IP, 30036)
