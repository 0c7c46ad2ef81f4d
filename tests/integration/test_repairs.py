"""What others remove of what proxyd has made on the node is back within a second, and is said once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import ask, wait_for
from tests.support.daemon import Proxyd
from tests.support.manifests import endpoints, service, write
from tests.support.netlab import EXTERNAL_IP, POD_PORT, Lab, Namespace, pod_ip, pod_ip6

VIP, VIP6 = "10.96.0.10", "fd96::10"
EXTERNAL_IP6 = "2001:db8:80::10"
REMOVED = "somebody has removed what proxyd had made: it is put back"
FIGHT = "somebody removes again and again what proxyd makes: it is put back less often from now on"
# "Within a second", on a machine that is busy with other tests too; looking every 30 s is not enough.
SOON = 5.0

Run = Callable[..., Proxyd]


def both_protocols(name: str) -> list[dict[str, Any]]:
    """A Service of both families with VIPs and foreign addresses, TCP and UDP, and its endpoints."""
    ports = [{"name": protocol.lower(), "protocol": protocol, "port": 80} for protocol in ("TCP", "UDP")]
    web = service(
        name,
        VIP,
        clusterIPs=[VIP, VIP6],
        ipFamilyPolicy="RequireDualStack",
        ipFamilies=["IPv4", "IPv6"],
        externalIPs=[EXTERNAL_IP, EXTERNAL_IP6],
    )
    web["spec"]["ports"] = ports
    return [
        web,
        *(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": family.lower(), "labels": {"kubernetes.io/service-name": name}},
                "addressType": family,
                "endpoints": [{"addresses": [ip]}],
                "ports": [{**port, "port": POD_PORT} for port in ports],
            }
            for family, ip in (("IPv4", pod_ip(1)), ("IPv6", pod_ip6(1)))
        ),
    ]


def made_by_proxyd(node: Namespace) -> list[str]:
    """Its routes, rules and tables, with what is in them."""
    routes = [
        line
        for family in ("-4", "-6")
        for what in (("route", "show", "table", "all"), ("rule",))
        for line in node.run("ip", family, *what).splitlines()
        if "proto 112" in line
    ]
    return sorted(routes) + sorted(node.run("nft", "list", "ruleset").splitlines())


def lines(daemon: Proxyd, event: str) -> list[str]:
    """What the lines of this event say that was removed."""
    found = (json.loads(line) for line in daemon.log().splitlines() if line.startswith("{"))
    return [line["what"] for line in found if line["event"] == event]


def wait_quiet(daemon: Proxyd) -> None:
    """Wait until control has heard what there was to hear: it answers, and once more after a while."""
    for _ in range(2):
        daemon.status()
        time.sleep(0.3)  # longer than it waits for more news


@pytest.fixture
def daemon(lab6: Lab, folder: Path, manifests: Path) -> Iterator[Proxyd]:
    write(manifests / "web.yaml", *both_protocols("web"))
    flags = ("--service-cluster-ip-range=10.96.0.0/16,fd96::/112",)
    with Proxyd(lab6.node, folder, manifests, flags=flags) as made:
        for ip in (VIP, VIP6, EXTERNAL_IP, EXTERNAL_IP6):
            made.wait_listener(ip, 80)
        yield made


TABLES = ("proxyd", "proxyd-udp", "proxyd-steering", "proxyd-fragments")
# In groups: the same table more than five times a minute would be a fight.
WHOLE: dict[str, tuple[str, str]] = {
    "VIP routes": (
        "ip -4 route flush table local proto 112; ip -6 route flush table local proto 112",
        "2 VIP routes",
    ),
    "one VIP route": (f"ip route del local {VIP} dev lo table local", "1 VIP route"),
    "routes of the other table": ("ip route flush table 7112", "1 route of table 7112"),
    "policy rules": (
        "ip rule flush; ip rule add pref 32766 lookup main; ip -6 rule flush; ip -6 rule add pref 32766 lookup main",
        "4 policy rules",
    ),
    "all of nft": ("nft flush ruleset", ", ".join(f"nft table {table}" for table in TABLES)),
    **{f"table {table}": (f"nft delete table inet {table}", f"nft table {table}") for table in TABLES},
    "the table for ARP": ("nft delete table arp proxyd", "nft table proxyd"),
}
PARTS = {
    "a set": ("nft flush set inet proxyd vips4", "nft table proxyd"),
    "a chain's rules": ("nft flush chain inet proxyd input", "nft table proxyd"),
    "an element": (f"nft delete element arp proxyd vips '{{ {VIP} }}'", "nft table proxyd"),
    **{f"rules of {table}": (f"nft flush table inet {table}", f"nft table {table}") for table in TABLES},
}


@pytest.mark.parametrize("removals", [WHOLE, PARTS], ids=["whole", "parts"])
def test_what_others_remove_is_back_soon_and_is_said_once(
    lab6: Lab, daemon: Proxyd, removals: dict[str, tuple[str, str]]
) -> None:
    node = lab6.node
    before = made_by_proxyd(node)
    assert len(node.run("nft", "list", "tables").splitlines()) == len(TABLES) + 1
    for what, (command, told) in removals.items():
        so_far = len(lines(daemon, REMOVED))
        node.run("sh", "-c", command)
        wait_for(lambda: made_by_proxyd(node) == before, f"{what} to be back", SOON, pause=0.02)
        wait_quiet(daemon)
        assert lines(daemon, REMOVED)[so_far:] == [told], what
        assert made_by_proxyd(node) == before, what
    assert ask(lab6.client, VIP, 80) == ask(lab6.client, VIP6, 80) == "pod-1"
    assert ask(lab6.outside, EXTERNAL_IP, 80) == "pod-1"


def test_only_its_own_rules_are_put_back(lab6: Lab, daemon: Proxyd) -> None:
    node = lab6.node

    def own() -> list[str]:
        return [line for line in made_by_proxyd(node) if "lookup 711" in line]

    before = own()
    assert len(before) == 4
    node.run("ip", "rule", "flush")
    wait_for(lambda: own() == before, "the rules to be back", SOON, pause=0.02)
    wait_quiet(daemon)
    assert "lookup main" not in node.run("ip", "rule")


def test_an_interface_goes_and_takes_the_vips_that_it_had_along(
    lab: Lab, manifests: Path, proxyd: Run
) -> None:
    """As of kube-proxy's IPVS mode, whose device has all VIPs: while they are there proxyd makes no routes."""
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    lab.node.ip(
        f"link add name kube-ipvs0 type bridge\naddr add {VIP}/32 dev kube-ipvs0\nlink set kube-ipvs0 up"
    )
    daemon = proxyd()
    daemon.wait_listener(VIP, 80)
    assert ask(lab.client, VIP, 80) == "pod-1"
    lab.node.ip("link del kube-ipvs0")
    wait_for(lambda: f"local {VIP}" in "".join(made_by_proxyd(lab.node)), "the route", SOON, pause=0.02)
    assert ask(lab.client, VIP, 80) == "pod-1"
    assert lines(daemon, REMOVED) == ["1 VIP that another interface had"]
    # One that comes and goes while there is a route changes nothing.
    lab.node.ip(
        f"link add name kube-ipvs0 type bridge\naddr add {VIP}/32 dev kube-ipvs0\nlink set kube-ipvs0 up"
    )
    assert ask(lab.client, VIP, 80) == "pod-1"
    lab.node.ip("link del kube-ipvs0")
    wait_quiet(daemon)
    assert ask(lab.client, VIP, 80) == "pod-1"


def test_lo_goes_down_and_up(lab6: Lab, daemon: Proxyd) -> None:
    """The kernel takes IPv6 routes away then, and nobody asked it to."""
    before = made_by_proxyd(lab6.node)
    lab6.node.ip("link set lo down\nlink set lo up")
    wait_for(lambda: made_by_proxyd(lab6.node) == before, "all to be back", SOON, pause=0.02)
    assert ask(lab6.client, VIP6, 80) == "pod-1"
    wait_quiet(daemon)
    assert len(lines(daemon, REMOVED)) == 1


def cpu_seconds(daemon: Proxyd) -> float:
    """Processor time of control."""
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_fight_is_said_and_slowed_down(lab6: Lab, daemon: Proxyd) -> None:
    node = lab6.node
    before = made_by_proxyd(node)
    removals = 0

    def remove() -> int:
        """Take the route away whenever it is there."""
        nonlocal removals
        if f"local {VIP} " in node.run("ip", "route", "show", "table", "local"):
            node.run("ip", "route", "del", "local", VIP, "dev", "lo", "table", "local")
            removals += 1
        return removals

    wait_for(lambda: remove() and lines(daemon, FIGHT), "the fight to be said", pause=0.02)
    assert lines(daemon, FIGHT) == ["1 VIP route"]
    assert 6 <= removals <= 8
    assert [problem for problem in daemon.status()["problems"] if "again and again" in str(problem)]
    # What is not fought over is back at once, and the other is told of no more.
    so_far = removals
    until = time.monotonic() + 5
    while time.monotonic() < until:
        remove()
        time.sleep(0.02)
    assert removals - so_far <= 1
    told = len(lines(daemon, REMOVED))
    node.run("nft", "delete", "table", "inet", "proxyd-steering")
    wait_for(lambda: "proxyd-steering" in node.run("nft", "list", "tables"), "the table", SOON, pause=0.02)
    assert lines(daemon, REMOVED)[told:] == ["nft table proxyd-steering"]
    # In the end the route is back too.
    wait_for(lambda: made_by_proxyd(node) == before, "all to be back", 60)
    assert lines(daemon, FIGHT) == ["1 VIP route"]


def test_thousands_of_changes_of_others_cost_little(lab6: Lab, daemon: Proxyd) -> None:
    """Of a routing daemon, and of a program that uses nft: none of them is proxyd's."""
    node = lab6.node
    before = made_by_proxyd(node)
    wait_quiet(daemon)
    began = cpu_seconds(daemon)
    prefixes = [f"172.{16 + i // 256 % 16}.{i % 256}.{i // 4096 * 64}/26" for i in range(10_000)]
    add = "\n".join(f"route add {prefix} via 198.51.100.2 proto bird" for prefix in prefixes)
    delete = "\n".join(f"route del {prefix} via 198.51.100.2 proto bird" for prefix in prefixes)
    node.ip(add)
    node.ip(delete)
    elements = ", ".join(f"10.{i // 250}.{i % 250}.1" for i in range(10_000))
    node.run(
        *("nft", "-f", "-"),
        stdin=f"add table ip others\nadd set ip others s {{ type ipv4_addr; }}\n"
        f"add element ip others s {{ {elements} }}\n",
    )
    node.run("nft", "flush", "set", "ip", "others", "s")
    node.run("nft", "delete", "table", "ip", "others")
    wait_quiet(daemon)
    spent = cpu_seconds(daemon) - began
    print(f"control: {spent:.2f} s of processor time")
    assert spent < 0.3
    assert lines(daemon, REMOVED) == []
    assert made_by_proxyd(node) == before


def test_its_own_changes_are_not_taken_for_those_of_others(lab: Lab, manifests: Path, proxyd: Run) -> None:
    """Also where they are so many that the kernel drops the news of them."""
    many = [service(f"s{i}", f"10.96.{i // 250 + 1}.{i % 250 + 1}") for i in range(2000)]
    ends = [endpoints(f"s{i}", 1) for i in range(2000)]
    write(manifests / "many.yaml", *many, *ends)
    daemon = proxyd()
    daemon.wait_listener("10.96.8.250", 80)
    (manifests / "many.yaml").unlink()
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    daemon.wait_listener(VIP, 80)
    wait_for(lambda: len(made_by_proxyd(lab.node)) < 100, "the others to be gone")
    wait_quiet(daemon)
    began = cpu_seconds(daemon)
    for turn in range(20):
        write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1 + turn % 2))
        write(manifests / "more.yaml", service("more", f"10.96.0.{20 + turn}"), endpoints("more", 1))
        daemon.wait_listener(f"10.96.0.{20 + turn}", 80)
    print(f"control: {cpu_seconds(daemon) - began:.2f} s of processor time")
    wait_quiet(daemon)
    assert lines(daemon, REMOVED) == []
