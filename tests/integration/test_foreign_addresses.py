"""externalIPs that are not the node's own: single ports are taken, for whoever asks, and nothing else changes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxyd.host.nft import which
from tests.support.clients import Load, answer, ask, connect, read_all, refused
from tests.support.daemon import Proxyd
from tests.support.dns import DNS_PORT, echo, listens, programs
from tests.support.dns import answers as udp_answers
from tests.support.dns import ask as ask_udp
from tests.support.manifests import Document, write
from tests.support.netlab import (
    EXTERNAL_IP,
    EXTERNAL_IP6,
    NODE_IP,
    NODE_IP6,
    OUTSIDE_IP,
    OUTSIDE_IP6,
    POD_PORT,
    Lab,
    Namespace,
    pod_ip,
    pod_ip6,
    routes_and_rules,
)
from tests.support.pod_servers import stream_digest
from tests.support.waiting import wait_for

VIP, VIP6 = "10.96.0.10", "fd00:10:96::10"
NOBODYS, NOBODYS6 = "192.0.2.200", "2001:db8:80::200"  # nobody has them; the node has routes that lead there
FOREIGN = (EXTERNAL_IP, EXTERNAL_IP6, NOBODYS, NOBODYS6)
# In a mount namespace of its own: the program is not executable there.
WITHOUT_NFT = ("unshare", "--mount", "sh", "-c", f'mount --bind /dev/null {which("nft")} && exec "$@"', "sh")
Run = Callable[..., Proxyd]


@pytest.fixture
def town() -> Iterator[Lab]:
    """The lab with IPv6, the far host at both external addresses, and UDP servers in pod-1 and the far host."""
    with Lab(2, ipv6=True) as lab:
        lab.reach_far_by_ipv6()
        with programs(echo(lab.pods[0]), *far_echoes(lab)):
            yield lab


def far_echoes(lab: Lab, port: int = DNS_PORT) -> list[subprocess.Popen[bytes]]:
    """A UDP server of the far host at each external address, from which its answers come."""
    return [echo(lab.far, ip, port) for ip in (f"::ffff:{EXTERNAL_IP}", EXTERNAL_IP6)]


@pytest.fixture
def proxyd(town: Lab, folder: Path, manifests: Path) -> Iterator[Run]:
    """Makes `proxyd run` over the manifests in the town's node and starts it; ended with the test."""
    made: list[Proxyd] = []

    def run(**options: object) -> Proxyd:
        daemon = Proxyd(town.node, folder, manifests, **options)  # type: ignore[arg-type]  # as Proxyd takes them
        made.append(daemon)
        return daemon.start()

    yield run
    for daemon in made:
        daemon.__exit__()


def web(*external: str, **spec: object) -> Document:
    """A Service of both families: TCP 80 and UDP 53."""
    ports = [
        {"name": "tcp", "port": 80, "targetPort": POD_PORT},
        {"name": "udp", "port": 53, "targetPort": DNS_PORT, "protocol": "UDP"},
    ]
    families = {
        "clusterIPs": [VIP, VIP6],
        "ipFamilies": ["IPv4", "IPv6"],
        "ipFamilyPolicy": "RequireDualStack",
    }
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"clusterIP": VIP, "ports": ports, "externalIPs": list(external), **families, **spec},
    }


def slices(*ips: str, tcp: int = POD_PORT, udp: int = DNS_PORT) -> list[Document]:
    """Its endpoints."""
    return [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": f"web-{family.lower()}", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": family,
            "endpoints": [{"addresses": [ip]} for ip in ips if (":" in ip) == (family == "IPv6")],
            "ports": [{"name": "tcp", "port": tcp}, {"name": "udp", "port": udp, "protocol": "UDP"}],
        }
        for family in ("IPv4", "IPv6")
    ]


POD_1 = slices(pod_ip(1), pod_ip6(1))


def hosts(town: Lab) -> tuple[Namespace, ...]:
    return town.node, town.client, town.outside


@contextlib.contextmanager
def at_all_addresses(node: Namespace, port: int, kind: int = socket.SOCK_STREAM) -> Iterator[None]:
    """A daemon of the node at [::], IPv4 included, that nobody of these tests is to reach."""
    with node.socket(socket.AF_INET6, kind) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("::", port))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        yield


def wait_served(town: Lab, daemon: Proxyd, *ips: str) -> None:
    for ip in ips:
        daemon.wait_listener(ip, 80)
        wait_for(lambda ip=ip: udp_answers(town.client, ip), f"an answer of {ip}")  # type: ignore[misc]  # a bound default has no type


@pytest.mark.parametrize("strict", ["0", "1"], ids=["", "rp_filter, br_netfilter"])
@pytest.mark.parametrize("how", ["marks", "marks beside daemons", "rules"])
def test_single_ports_are_taken_from_everywhere(
    town: Lab, manifests: Path, proxyd: Run, how: str, strict: str
) -> None:
    for device in ("all", "default", "out0", "cbr0", "far0"):
        town.node.call(Path(f"/proc/sys/net/ipv4/conf/{device}/rp_filter").write_text, strict)
    with contextlib.suppress(FileNotFoundError):  # the module is not there
        town.node.sysctl(
            net__bridge__bridge_nf_call_iptables=strict, net__bridge__bridge_nf_call_ip6tables=strict
        )
    before = routes_and_rules(town.node)
    write(manifests / "web.yaml", web(*FOREIGN), *POD_1)
    with contextlib.ExitStack() as stack:
        if how == "marks beside daemons":
            if os.geteuid() != 0:
                pytest.skip("bpf(2) needs root: listeners are bound, which such daemons do not allow")
            for port in (80, 81):
                stack.enter_context(at_all_addresses(town.node, port))
            stack.enter_context(at_all_addresses(town.node, 53, socket.SOCK_DGRAM))
        daemon = proxyd(before=WITHOUT_NFT if how == "rules" else ())
        wait_served(town, daemon, *FOREIGN)
        for host in hosts(town):
            for ip in FOREIGN:
                for _ in range(3):
                    assert ask(host, ip, 80) == "pod-1", (host.name, ip)
                    assert ask_udp(host, ip, 53) == b"pod-1", (host.name, ip)
            for ip in (EXTERNAL_IP, EXTERNAL_IP6):
                assert ask(host, ip, 8080) == "far", (host.name, ip)
                assert ask_udp(host, ip, DNS_PORT) == b"far", (host.name, ip)
        problems = [problem["message"] for problem in daemon.status()["problems"]]
        assert ("install nftables" in str(problems)) == (how == "rules")
        rules = town.node.run("ip", "rule")
        assert ("fwmark" in rules, "dport" in rules) == ((False, True) if how == "rules" else (True, False))
        assert daemon.stop() == 0
    assert routes_and_rules(town.node) == before


def test_large_datagrams(town: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", web(*FOREIGN), *POD_1)
    daemon = proxyd()
    wait_served(town, daemon, *FOREIGN)
    for host in hosts(town):
        for ip in FOREIGN:
            data = os.urandom(30_000)
            assert ask_udp(host, ip, 53, data) == data, (host.name, ip)


def test_refusals(town: Lab, manifests: Path, proxyd: Run) -> None:
    """At once, while there is no endpoint and while relays of a closed listener live on."""
    write(manifests / "web.yaml", web(*FOREIGN))
    ends = manifests / "ends.yaml"
    write(ends, *POD_1)
    daemon = proxyd()
    wait_served(town, daemon, *FOREIGN)
    held = [connect(host, ip, 80) for host in hosts(town) for ip in FOREIGN]
    for sock in held:
        sock.sendall(b"echo\nto")
        assert sock.recv(10) == b"to"
    write(ends, *slices())
    for ip in FOREIGN:
        daemon.wait_listener(ip, 80, "NoEndpoints")
    for host in hosts(town):
        for ip in FOREIGN:
            wait_for(lambda host=host, ip=ip: refused(host, ip, 80), f"{ip} to refuse {host.name}")  # type: ignore[misc]  # as above
            assert refused_udp(host, ip), (host.name, ip)
    for sock in held:
        sock.sendall(b"fro")
        assert sock.recv(10) == b"fro"
        sock.close()
    write(ends, *POD_1)
    wait_served(town, daemon, *FOREIGN)
    for host in hosts(town):
        for ip in FOREIGN:
            assert ask(host, ip, 80) == "pod-1"


def refused_udp(host: Namespace, ip: str) -> bool:
    """Whether a datagram to port 53 is refused at once: by ICMP, or by EPERM to a client of the node itself."""
    with host.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        sock.connect((ip, 53))
        try:
            sock.send(b"who")
            sock.recv(100)
        except (ConnectionRefusedError, PermissionError):
            return True
        except TimeoutError:
            return False
        return False


# Endpoints that are steered themselves


def test_an_endpoint_that_is_itself_a_steered_port(town: Lab, manifests: Path, proxyd: Run) -> None:
    """The far host is its own externalIP's endpoint, of TCP and UDP: it is reached, and not proxyd itself."""
    with programs(*far_echoes(town, 53)):
        ends = slices(EXTERNAL_IP, EXTERNAL_IP6, tcp=80, udp=53)
        write(manifests / "web.yaml", web(EXTERNAL_IP, EXTERNAL_IP6), *ends)
        daemon = proxyd()
        wait_served(town, daemon, EXTERNAL_IP, EXTERNAL_IP6)
        for host in hosts(town):
            for ip in (EXTERNAL_IP, EXTERNAL_IP6, VIP, VIP6):
                if host is town.outside and ip in (VIP, VIP6):
                    continue  # it has no route to VIPs
                assert ask(host, ip, 80) == "far", (host.name, ip)
                assert ask_udp(host, ip, 53) == b"far", (host.name, ip)
        # All that was sent arrives, though the relay ended its socket before.
        with connect(town.client, EXTERNAL_IP, 80, 30) as sock:
            sock.sendall(b"late 0\n")
            data = os.urandom(20_000_000)
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock).decode() == hashlib.sha256(data).hexdigest()
        tcp = [one for one in daemon.get("connections") if one["protocol"] == "TCP"]
        assert tcp == [], "no connection of proxyd's to itself"


def test_a_client_of_the_node_that_sets_a_dscp_is_served_too(town: Lab, manifests: Path, proxyd: Run) -> None:
    """Some of them give a socket the priority that proxyd's own connections to endpoints have."""
    write(manifests / "web.yaml", web(EXTERNAL_IP, EXTERNAL_IP6), *POD_1)
    daemon = proxyd()
    wait_served(town, daemon, EXTERNAL_IP)
    for dscp in range(64):
        with town.node.socket() as sock:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, dscp << 2)
            sock.settimeout(10)
            sock.connect((EXTERNAL_IP, 80))
            sock.sendall(b"who\n")
            assert read_all(sock) == b"pod-1\n", f"DSCP {dscp}"


# What leads there


def test_the_nodes_own_clients_need_no_route_to_the_address(town: Lab, manifests: Path, proxyd: Run) -> None:
    """A node without a default route takes such an address, and its other ports are not the node's own."""
    write(manifests / "web.yaml", web(NOBODYS, NOBODYS6), *POD_1)
    town.node.ip("route del default\nroute del 2001:db8:80::/64")
    with at_all_addresses(town.node, 22):
        daemon = proxyd()
        for ip in (NOBODYS, NOBODYS6):
            daemon.wait_listener(ip, 80)
            wait_for(lambda ip=ip: udp_answers(town.node, ip), f"an answer of {ip}")  # type: ignore[misc]  # as above
            assert ask(town.node, ip, 80) == "pod-1"
            assert refused(town.node, ip, 22)


@pytest.mark.parametrize("bit", ["0x1000000", "64"])
def test_another_bit_of_the_mark(town: Lab, folder: Path, manifests: Path, bit: str) -> None:
    """Also after a kill, in the place of the one before."""
    write(manifests / "web.yaml", web(EXTERNAL_IP), *POD_1)
    with Proxyd(town.node, folder, manifests) as daemon:
        wait_served(town, daemon, EXTERNAL_IP)
        assert "fwmark 0x1000/0x1000 " in town.node.run("ip", "rule")
        daemon.signal(signal.SIGKILL)
        daemon.wait()
    with Proxyd(town.node, folder, manifests, flags=("--fwmark", bit)) as daemon:
        wait_served(town, daemon, EXTERNAL_IP)
        rules = town.node.run("ip", "rule")
        wait_for(lambda: "0x1000/" not in town.node.run("ip", "rule"), "the end of the rule before")
        assert f"fwmark {int(bit, 0):#x}/{int(bit, 0):#x} " in rules
        for host in hosts(town):
            assert ask(host, EXTERNAL_IP, 80) == "pod-1"
            assert ask(host, EXTERNAL_IP, 8080) == "far"


def test_from_rules_to_marks_nobody_is_lost(town: Lab, manifests: Path, proxyd: Run) -> None:
    """As after nftables was installed, or from a version that had a rule for each port; relays go on as well."""
    write(manifests / "web.yaml", web(*FOREIGN), *POD_1)
    daemon = proxyd(before=WITHOUT_NFT, flags=("--sync-period", "1s"))
    wait_served(town, daemon, *FOREIGN)
    # What an earlier version had where it refused.
    town.node.run("nft", "add table inet proxyd-refusal")
    with contextlib.ExitStack() as stack:
        places = [(host, ip) for host in hosts(town) for ip in (EXTERNAL_IP, NOBODYS6)]
        held = [stack.enter_context(connect(host, ip, 80)) for host, ip in places]
        for sock in held:
            sock.sendall(b"echo\n")
        loads = [stack.enter_context(Load(host, ip, 80, 1)) for host, ip in places]
        for load in loads:
            load.wait_more(5)
        subprocess.run(
            ["nsenter", "--mount", f"--target={daemon.pid}", "umount", str(which("nft"))], check=True
        )
        wait_for(lambda: "dport" not in town.node.run("ip", "rule"), "the end of the rules")
        for load in loads:
            load.wait_more(5)
        assert daemon.cli("upgrade").returncode == 0
        for load in loads:
            load.wait_more(5)
        for sock in held:
            sock.sendall(b"to and fro")
            assert sock.recv(20) == b"to and fro"
    for load in loads:
        assert (load.outcome.refused, load.outcome.broken) == ([], [])
    assert "fwmark" in town.node.run("ip", "rule")
    assert "proxyd-refusal" not in town.node.run("nft", "list", "tables")
    assert not daemon.status()["problems"]
    assert daemon.stop() == 0
    assert "proxyd" not in town.node.run("nft", "list", "tables")


def test_from_marks_to_rules_where_nft_is_gone(town: Lab, folder: Path, manifests: Path) -> None:
    """A killed daemon's table does not outlive it: its refusals and marks would be in the way."""
    before = routes_and_rules(town.node)
    write(manifests / "web.yaml", web(*FOREIGN))
    with Proxyd(town.node, folder, manifests) as daemon:
        for ip in FOREIGN:
            daemon.wait_listener(ip, 80, "NoEndpoints")
            wait_for(lambda ip=ip: refused(town.client, ip, 80), f"{ip} to refuse")  # type: ignore[misc]  # as above
        daemon.signal(signal.SIGKILL)
        daemon.wait()
    write(manifests / "web.yaml", web(*FOREIGN), *POD_1)
    with Proxyd(town.node, folder, manifests, before=WITHOUT_NFT) as daemon:
        wait_served(town, daemon, *FOREIGN)
        for host in hosts(town):
            for ip in FOREIGN:
                assert ask(host, ip, 80) == "pod-1", (host.name, ip)
                assert ask_udp(host, ip, 53) == b"pod-1", (host.name, ip)
        assert "proxyd-steering" not in town.node.run("nft", "list", "tables")
        assert daemon.stop() == 0
    assert routes_and_rules(town.node) == before


def test_what_somebody_flushes_comes_back(town: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", web(*FOREIGN), *POD_1)
    daemon = proxyd(flags=("--sync-period", "1s"))
    wait_served(town, daemon, *FOREIGN)
    before = routes_and_rules(town.node)
    for command in (
        ("nft", "flush", "ruleset"),
        ("nft", "flush", "table", "inet", "proxyd-steering"),
        ("nft", "flush", "set", "inet", "proxyd-steering", "ports4"),
        ("ip", "rule", "del", "pref", "112"),
        ("ip", "-6", "rule", "del", "pref", "112"),
        ("ip", "rule", "del", "pref", "33112"),
        ("ip", "route", "flush", "table", "7112"),
        ("ip", "-6", "route", "flush", "table", "7113"),
    ):
        town.node.run(*command)
        wait_for(lambda: routes_and_rules(town.node) == before, f"what `{' '.join(command)}` took")
        for ip in FOREIGN:
            wait_for(lambda ip=ip: answer(town.client, ip, 80) == "pod-1", f"{ip} after {command}")  # type: ignore[misc]  # as above


# Paths with a small MTU


@pytest.fixture
def distant(town: Lab) -> Iterator[Namespace]:
    """A client behind the outside host, on a link of 1,280 bytes."""
    with Namespace("distant") as made:
        town.outside.sysctl(net__ipv4__ip_forward="1", net__ipv6__conf__all__forwarding="1")
        town.outside.ip(
            f"link add name narrow type veth peer name eth0 netns {made.path}\n"
            "link set narrow mtu 1280\naddr add 10.77.0.1/24 dev narrow\n"
            "addr add fd77::1/64 dev narrow nodad\nlink set narrow up\n"
            f"route add {VIP}/32 via {NODE_IP}\nroute add {VIP6}/128 via {NODE_IP6}"
        )
        made.ip(
            "addr add 10.77.0.2/24 dev eth0\naddr add fd77::2/64 dev eth0 nodad\nlink set eth0 mtu 1280 up\n"
            # It does not tell by its segment size that the link is narrow.
            "route add default via 10.77.0.1 advmss 1460\nroute add default via fd77::1 advmss 1440"
        )
        town.node.ip(f"route add 10.77.0.0/24 via {OUTSIDE_IP}\nroute add fd77::/64 via {OUTSIDE_IP6}")
        made.settle()
        yield made


@pytest.mark.parametrize("ip", [VIP, VIP6, EXTERNAL_IP, EXTERNAL_IP6, NOBODYS, NOBODYS6])
def test_a_client_behind_a_small_mtu(
    town: Lab, distant: Namespace, manifests: Path, proxyd: Run, ip: str
) -> None:
    """Only a router's word makes what it is sent fit."""
    write(manifests / "web.yaml", web(*FOREIGN), *POD_1)
    daemon = proxyd()
    wait_served(town, daemon, ip)
    # Asked before the path is known to be narrow.
    sent = 0
    with distant.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        sock.connect((ip, 53))

        def answered() -> bool:
            nonlocal sent
            sent += 1
            sock.send(b"x" * 1400)
            try:
                return sock.recv(2000) == b"x" * 1400
            except TimeoutError:
                return False

        wait_for(answered, "an answer")
    assert sent <= 2, "one at most is lost until the kernel knows"
    with connect(distant, ip, 80, 20) as sock:
        size = 200_000
        sock.sendall(f"duplex {size} 7\n".encode())
        sock.shutdown(socket.SHUT_WR)
        data = read_all(sock)
    assert hashlib.sha256(data[:size]).hexdigest() == stream_digest(7, size)


def test_a_port_that_was_listened_on_is_found(town: Lab) -> None:
    """The helpers of these tests ask what they are meant to."""
    assert listens(town.pods[0])
    assert ask(town.far, pod_ip(1), POD_PORT) == "pod-1"
