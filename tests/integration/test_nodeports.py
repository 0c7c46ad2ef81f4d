"""Where NodePorts and VIPs are open: the node's addresses as they come and go, IPv6, --nodeport-addresses, --vip-mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.clients import answers, ask, many, refused
from tests.support.daemon import Proxyd
from tests.support.manifests import endpoints, endpoints_at, service, slice6, write
from tests.support.netlab import (
    BRIDGE_IP,
    NODE_FAR_IP,
    NODE_IP,
    NODE_IP6,
    POD_PORT,
    Lab,
    pod_ip6,
    routes_and_rules,
)
from tests.support.pod_servers import PodServers
from tests.support.waiting import wait_for

VIP = "10.96.0.10"
VIP6 = "fd00:10:96::10"
ADDED_IP = "203.0.113.99"

Run = Callable[..., Proxyd]


@pytest.fixture
def web(manifests: Path) -> None:
    """A Service at the VIP and NodePort 30080."""
    write(manifests / "web.yaml", service("web", VIP, node_port=30080), endpoints("web", 1, 2, 3))


@pytest.mark.usefixtures("web")
def test_listeners_follow_the_node_s_addresses(lab: Lab, proxyd: Run) -> None:
    daemon = proxyd()
    daemon.wait_listener(NODE_IP, 30080)
    for _ in range(2):
        lab.node.ip(f"addr add {ADDED_IP}/24 dev out0")
        assert wait_for(lambda: answers(lab.outside, ADDED_IP, 30080), "the new address to serve")
        daemon.wait_listener(ADDED_IP, 30080)
        assert refused(lab.outside, ADDED_IP, 80)
        lab.node.ip(f"addr del {ADDED_IP}/24 dev out0")
        daemon.wait_listeners(lambda found: all(each.ip != ADDED_IP for each in found), "the listener to go")
    assert ask(lab.outside, NODE_IP, 30080)
    assert daemon.find(NODE_IP, 30080)


@pytest.mark.usefixtures("web")
def test_a_link_that_goes_takes_its_listeners_with_it(lab: Lab, proxyd: Run) -> None:
    daemon = proxyd()
    lab.node.ip("link add name cbr1 type bridge\naddr add 172.31.0.1/24 dev cbr1\nlink set cbr1 up")
    daemon.wait_listener("172.31.0.1", 30080)
    assert ask(lab.outside, "172.31.0.1", 30080)
    lab.node.ip("link del cbr1")
    daemon.wait_listeners(lambda found: all(each.ip != "172.31.0.1" for each in found), "the listener to go")


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize(
    ("flag", "opened", "closed"),
    [
        ("127.0.0.0/8", (), (NODE_IP, BRIDGE_IP, NODE_FAR_IP)),
        ("203.0.113.0/24", (NODE_IP,), (BRIDGE_IP, NODE_FAR_IP)),
        ("203.0.113.0/24,10.244.0.0/16", (NODE_IP, BRIDGE_IP), (NODE_FAR_IP,)),
        ("primary", (NODE_FAR_IP,), (NODE_IP, BRIDGE_IP)),  # the default route leaves by that link
    ],
)
def test_nodeport_addresses(
    lab: Lab, proxyd: Run, flag: str, opened: tuple[str, ...], closed: tuple[str, ...]
) -> None:
    daemon = proxyd(flags=("--nodeport-addresses", flag))
    daemon.wait_listener(VIP, 80)
    daemon.wait_listener(opened[0] if opened else "127.0.0.1", 30080)
    for origin in (lab.node, lab.client, lab.outside):
        for ip in opened:
            assert answers(origin, ip, 30080)
        for ip in closed:
            assert refused(origin, ip, 30080)
    assert answers(lab.node, "127.0.0.1", 30080) == (flag == "127.0.0.0/8")


@pytest.mark.usefixtures("web")
def test_an_address_that_is_not_admitted_stays_closed_when_it_appears(lab: Lab, proxyd: Run) -> None:
    daemon = proxyd(flags=("--nodeport-addresses", "203.0.113.0/28"))
    daemon.wait_listener(NODE_IP, 30080)
    lab.node.ip(f"addr add {ADDED_IP}/24 dev out0\naddr add 203.0.113.11/24 dev out0")
    # The admitted one, which came second, is open: so the other was seen and left closed.
    daemon.wait_listener("203.0.113.11", 30080)
    assert refused(lab.outside, ADDED_IP, 30080)


@pytest.fixture
def proxyd6(lab6: Lab, folder: Path, manifests: Path) -> Iterator[Proxyd]:
    """A daemon over a dual-stack Service: VIPs, NodePort 30080, three pods of each family."""
    write(
        manifests / "web.yaml",
        service(
            "web",
            VIP,
            node_port=30080,
            clusterIPs=[VIP, VIP6],
            ipFamilies=["IPv4", "IPv6"],
            ipFamilyPolicy="RequireDualStack",
        ),
        endpoints("web", 1, 2, 3),
        slice6("web", *(pod_ip6(number) for number in (1, 2, 3))),
    )
    with Proxyd(lab6.node, folder, manifests) as daemon:
        yield daemon


def test_ipv6(lab6: Lab, proxyd6: Proxyd) -> None:
    proxyd6.wait_listener(VIP6, 80)
    proxyd6.wait_listener(NODE_IP6, 30080)
    proxyd6.wait_listener(VIP, 80)
    for origin in (lab6.node, lab6.client, lab6.outside):
        for ip, port in ((VIP6, 80), (NODE_IP6, 30080), (VIP, 80), (NODE_IP, 30080)):
            assert many(origin, ip, port, 6).answered == {"pod-1": 2, "pod-2": 2, "pod-3": 2}
        assert refused(origin, NODE_IP6, 80)
        assert refused(origin, VIP6, 30080)
    assert many(lab6.node, "::1", 30080, 6).total == 6
    # The endpoint is reached by its own family.
    assert ask(lab6.client, VIP6, 80, "peer").split()[1].startswith("fd00:10:244:")
    assert ask(lab6.client, VIP, 80, "peer").split()[1] == BRIDGE_IP


def test_ipv6_leaves_nothing_behind(lab6: Lab, folder: Path, manifests: Path) -> None:
    write(
        manifests / "web.yaml",
        service("web", VIP6, node_port=30080, ipFamilies=["IPv6"]),
        slice6("web", pod_ip6(1)),
    )
    clean = routes_and_rules(lab6.node)
    with Proxyd(lab6.node, folder, manifests) as daemon:
        daemon.wait_listener(VIP6, 80)
        daemon.wait_listener(NODE_IP6, 30080)
        assert ask(lab6.outside, VIP6, 80) == "pod-1"
        assert refused(lab6.outside, NODE_IP, 30080)  # an IPv6 Service has no IPv4 NodePort
        assert daemon.stop() == 0
    assert routes_and_rules(lab6.node) == clean


@pytest.mark.usefixtures("web")
def test_vip_mode_loopback_maps_the_vip(lab: Lab, proxyd: Run) -> None:
    clean = routes_and_rules(lab.node)
    daemon = proxyd(flags=("--vip-mode", "loopback"))
    daemon.wait_listener("127.96.0.10", 80)
    assert answers(lab.node, "127.96.0.10", 80)
    assert refused(lab.node, "127.96.0.11", 80)
    assert answers(lab.outside, NODE_IP, 30080)
    # The status shows the mapping, and the node was not touched.
    assert VIP in daemon.cli("get", "listeners", "-A").stdout
    assert routes_and_rules(lab.node) == clean


@pytest.mark.usefixtures("web")
def test_vip_mode_none_serves_node_ports_only(lab: Lab, proxyd: Run) -> None:
    daemon = proxyd(flags=("--vip-mode", "none"))
    daemon.wait_listener(NODE_IP, 30080)
    assert answers(lab.outside, NODE_IP, 30080)
    daemon.wait_listener(VIP, 80, "Disabled")
    assert not answers(lab.client, VIP, 80, timeout=0.5)
    assert VIP not in lab.node.run("ip", "route", "show", "table", "local")


@pytest.mark.usefixtures("web")
def test_vip_mode_bind_takes_what_is_already_local(lab: Lab, proxyd: Run) -> None:
    daemon = proxyd(flags=("--vip-mode", "bind"))
    failed = daemon.wait_listener(VIP, 80, "Failed")
    assert failed.detail
    lab.node.ip(f"addr add {VIP}/32 dev lo")
    daemon.wait_listener(VIP, 80)
    assert answers(lab.outside, VIP, 80)


def test_without_root(lab: Lab, folder: Path, manifests: Path) -> None:
    # No VIP is given: it is allocated from 127.96.0.0/16, where no route is needed.
    write(manifests / "web.yaml", service("web", port=8080, node_port=30080), endpoints("web", 1, 2, 3))
    write(manifests / "low.yaml", service("low", port=80), endpoints("low", 1))
    with Proxyd(lab.node, folder, manifests, unprivileged=True, workers=2) as daemon:
        vip = daemon.vip("default/web")
        assert vip.startswith("127.96.")
        daemon.wait_listener(vip, 8080)
        daemon.wait_listener(NODE_IP, 30080)
        assert many(lab.node, vip, 8080, 9).total == 9
        assert many(lab.outside, NODE_IP, 30080, 9).total == 9
        # A port below 1024 is not for this user; the status says what to do, and the others serve.
        failed = daemon.wait_listener(daemon.vip("default/low"), 80, "Failed")
        assert "CAP_NET_BIND_SERVICE" in failed.detail
        assert daemon.stop() == 0


def test_endpoints_on_loopback_are_for_those_who_ask(lab: Lab, folder: Path, manifests: Path) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints_at("web", "127.0.0.1"))
    with PodServers() as servers:
        servers.add("local", lab.node.listen("127.0.0.1", POD_PORT))
        servers.start()
        with Proxyd(lab.node, folder, manifests) as daemon:
            daemon.wait_listener(VIP, 80, "NoEndpoints")
            assert "loopback" in daemon.log()
            assert refused(lab.client, VIP, 80)
        with Proxyd(lab.node, folder, manifests, flags=("--allow-loopback-endpoints",)) as daemon:
            daemon.wait_listener(VIP, 80)
            assert ask(lab.client, VIP, 80) == "local"
