"""UDP Services through the real program: real resolvers in pods, clients on several hosts."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.clients import lines_of, records
from tests.support.daemon import Proxyd, is_alive
from tests.support.dns import (
    DNS_PORT,
    NODE_PORT,
    VIP,
    VIP6,
    answers,
    ask,
    dns_endpoints,
    dns_service,
    echo,
    figures,
    listens,
    port_figures,
    programs,
)
from tests.support.manifests import write
from tests.support.netlab import (
    BRIDGE_IP,
    EXTERNAL_IP,
    NODE_FAR_IP,
    NODE_IP,
    NODE_IP6,
    OUTSIDE_IP,
    Lab,
    Namespace,
    pod_ip,
    routes_and_rules,
)
from tests.support.waiting import DEADLINE, wait_for

EXTERNAL_IP6 = "2001:db8:5::10"  # nobody's
UDP_SEGMENT = 103  # linux/udp.h
MORE_NODE_IPS = ("192.0.2.11", "192.0.2.12", "192.0.2.13")

Run = Callable[..., Proxyd]


def resolver(pod: Namespace) -> subprocess.Popen[bytes]:
    """dnsmasq in a pod, once it can be asked.

    who.test names the pod, mid.test has an answer over 512 bytes, big.test one over 1232.
    """

    def txt(name: str, strings: int) -> str:
        return f"--txt-record={name}," + ",".join(f"{i:02}" + "x" * 198 for i in range(strings))

    started = pod.popen(
        [
            *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"),
            *("--pid-file=", f"--port={DNS_PORT}", "--edns-packet-max=4096"),
            *(f"--txt-record=who.test,{pod.name}", txt("mid.test", 4), txt("big.test", 12)),
        ]
    )  # fmt: skip
    wait_for(lambda: listens(pod), f"the resolver in {pod.name}")
    return started


def dig(host: Namespace, server: str, name: str, *options: str, port: int = 53) -> str:
    """The answer of `dig`; "" where there is none."""
    argv = ["dig", f"@{server}", "-p", str(port), name, "TXT", "+tries=1", "+time=10", *options]
    return host.call(
        subprocess.run, argv, capture_output=True, text=True, timeout=DEADLINE, check=False
    ).stdout


def refused(host: Namespace, ip: str, port: int = 53) -> bool:
    """Whether a datagram is answered by ICMP port unreachable."""
    with host.socket(kind=socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        sock.connect((ip, port))
        sock.send(b"who")
        try:
            sock.recv(100)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            return False
        return False


def test_dns(lab: Lab, manifests: Path, proxyd: Run) -> None:
    for ip in MORE_NODE_IPS:
        lab.node.ip(f"addr add {ip}/24 dev out0")
    write(manifests / "dns.yaml", dns_service(), dns_endpoints(1, 2, 3))
    with programs(*(resolver(pod) for pod in lab.pods)):
        daemon = proxyd(workers=2)
        daemon.wait_listener(VIP, 53)
        wait_for(lambda: "pod-" in dig(lab.client, VIP, "who.test"), "an answer")
        answers = [dig(lab.client, VIP, "who.test", "+short").strip('"\n') for _ in range(9)]
        assert {answers.count(f"pod-{i}") for i in (1, 2, 3)} == {3}
        # Over 512 and over 1232 bytes by UDP; where the client takes no more than 512, by TCP on the same VIP.
        for host in (lab.client, lab.outside, lab.node):
            mid = dig(host, VIP, "mid.test", "+bufsize=1232", "+ignore")
            assert "(UDP)" in mid
            assert mid.count("x" * 198) == 4
            big = dig(host, VIP, "big.test", "+bufsize=4096", "+ignore")
            assert "(UDP)" in big
            assert big.count("x" * 198) == 12
            small = dig(host, VIP, "big.test", "+noedns")
            assert "Truncated, retrying in TCP mode" in small
            assert small.count("x" * 198) == 12
        # A node of many addresses answers from the one that was asked; dig takes no other.
        for ip in (NODE_IP, NODE_FAR_IP, BRIDGE_IP, *MORE_NODE_IPS):
            for host in (lab.outside, lab.client, lab.far):
                assert "status: NOERROR" in dig(host, ip, "who.test", port=NODE_PORT), f"{host.name} {ip}"


def test_dnsperf(lab: Lab, folder: Path, manifests: Path, proxyd: Run) -> None:
    """Ten thousand queries of a hundred clients: every one is answered."""
    write(manifests / "dns.yaml", dns_service(), dns_endpoints(1, 2, 3))
    queries = folder / "queries"
    queries.write_text("who.test TXT\nmid.test TXT\n")
    with programs(*(resolver(pod) for pod in lab.pods)):
        proxyd().wait_listener(VIP, 53)
        wait_for(lambda: "pod-" in dig(lab.client, VIP, "who.test"), "an answer")
        done = lab.client.run(
            *("dnsperf", "-s", VIP, "-d", str(queries), "-n", "5000", "-c", "100", "-Q", "5000", "-e"),
            timeout=DEADLINE,
        )
    assert "Queries completed:    10000 (100.00%)" in done
    assert "Queries lost:         0 (0.00%)" in done


def test_large_datagrams_and_every_kind_of_address(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "dns.yaml", dns_service(externalIPs=[EXTERNAL_IP]), dns_endpoints(1))
    with programs(echo(lab.pods[0])):
        daemon = proxyd()
        daemon.wait_listener(VIP, 53)
        wait_for(lambda: answers(lab.client, VIP), "an answer")
        for ip, port, host, most in (
            (VIP, 53, lab.client, 65_507),
            (VIP, 53, lab.node, 65_507),
            (NODE_IP, NODE_PORT, lab.outside, 65_507),
            ("127.0.0.1", NODE_PORT, lab.node, 65_507),
            (EXTERNAL_IP, 53, lab.outside, 65_507),
            (EXTERNAL_IP, 53, lab.node, 65_507),
        ):
            for size in (0, 1, 1472, most // 7, most):
                data = os.urandom(size)
                answer = ask(host, ip, port, data)
                assert hashlib.sha256(answer).digest() == hashlib.sha256(data).digest(), f"{ip} {size}"
        listing = daemon.get("connections")
        assert {entry["protocol"] for entry in listing} == {"UDP"}


def test_fragments_to_a_foreign_address(lab: Lab, manifests: Path, proxyd: Run) -> None:
    """The steered port gets whole datagrams; the foreign host still has its other ports; a stop undoes it."""
    before = routes_and_rules(lab.node)
    slices = manifests / "slices.yaml"
    write(manifests / "dns.yaml", dns_service(externalIPs=[EXTERNAL_IP]))
    write(slices, dns_endpoints(1))
    data = os.urandom(20_000)
    with programs(echo(lab.pods[0]), echo(lab.far, f"::ffff:{EXTERNAL_IP}")):
        wait_for(lambda: answers(lab.outside, EXTERNAL_IP, DNS_PORT), "the foreign host")
        daemon = proxyd()
        daemon.wait_listener(EXTERNAL_IP, 53)
        wait_for(lambda: answers(lab.outside, EXTERNAL_IP), "an answer")
        for host in (lab.outside, lab.client, lab.node):
            assert ask(host, EXTERNAL_IP, 53) == b"pod-1"
            assert ask(host, EXTERNAL_IP, 53, data) == data
            assert ask(host, EXTERNAL_IP, DNS_PORT) == b"far"
            assert ask(host, EXTERNAL_IP, DNS_PORT, data) == data
        assert "proxyd-fragments" in lab.node.run("nft", "list", "tables")
        # Nothing is put together where nothing is steered.
        write(slices, dns_endpoints())
        daemon.wait_listener(EXTERNAL_IP, 53, "NoEndpoints")
        wait_for(lambda: "proxyd-fragments" not in lab.node.run("nft", "list", "tables"), "its end")
        write(slices, dns_endpoints(1))
        daemon.wait_listener(EXTERNAL_IP, 53)
        wait_for(lambda: answers(lab.outside, EXTERNAL_IP), "an answer")
        assert ask(lab.outside, EXTERNAL_IP, 53, data) == data
        daemon.stop()
    assert routes_and_rules(lab.node) == before


def test_endpoints_come_and_go(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "dns.yaml", dns_service())
    slices = manifests / "slices.yaml"
    write(slices, dns_endpoints(1))
    with programs(*(echo(pod) for pod in lab.pods)):
        daemon = proxyd(workers=2)
        daemon.wait_listener(VIP, 53)
        with lab.client.socket(kind=socket.SOCK_DGRAM) as sock:
            sock.settimeout(DEADLINE)
            sock.connect((VIP, 53))

            def who() -> bytes:
                sock.send(b"who")
                return sock.recv(100)

            wait_for(lambda: answers(lab.client, VIP), "an answer")
            for pod in (2, 3, 1, 2):
                write(slices, dns_endpoints(pod))
                # One source port, no pause, no answer lost.
                wait_for(lambda name=b"pod-%d" % pod: who() == name, f"pod-{pod}", pause=0)
                assert {who() for _ in range(20)} == {b"pod-%d" % pod}
        for _ in range(2):
            write(slices, dns_endpoints())
            daemon.wait_listener(VIP, 53, "NoEndpoints")
            wait_for(lambda: refused(lab.client, VIP), "a refusal")
            assert refused(lab.outside, NODE_IP, NODE_PORT)
            write(slices, dns_endpoints(3))
            daemon.wait_listener(VIP, 53)
            wait_for(lambda: answers(lab.client, VIP), "an answer")
            assert ask(lab.outside, NODE_IP, NODE_PORT) == b"pod-3"


def test_a_dead_pod_is_passed_over(lab: Lab, manifests: Path, proxyd: Run) -> None:
    """No server listens in two of three pods: the kernel there answers with ICMP, and no query is lost."""
    write(manifests / "dns.yaml", dns_service(), dns_endpoints(1, 2, 3))
    with programs(echo(lab.pods[1])):
        proxyd().wait_listener(VIP, 53)
        wait_for(lambda: answers(lab.client, VIP), "an answer")
        assert [ask(lab.client, VIP) for _ in range(20)] == [b"pod-2"] * 20


def test_affinity_is_by_address(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "dns.yaml", dns_service(sessionAffinity="ClientIP"), dns_endpoints(1, 2, 3))
    with programs(*(echo(pod) for pod in lab.pods)):
        proxyd(workers=2).wait_listener(VIP, 53)
        wait_for(lambda: answers(lab.client, VIP), "an answer")
        hosts = (lab.client, lab.outside, lab.far)
        kept = {host.name: ask(host, VIP) for host in hosts[:2]}
        for host in hosts[:2]:
            assert {ask(host, VIP) for _ in range(9)} == {kept[host.name]}


def test_ipv6(lab6: Lab, folder: Path, manifests: Path) -> None:
    spec = {
        "clusterIPs": [VIP, VIP6],
        "ipFamilies": ["IPv4", "IPv6"],
        "ipFamilyPolicy": "RequireDualStack",
        "externalIPs": [EXTERNAL_IP6],
    }
    write(manifests / "dns.yaml", dns_service(**spec), dns_endpoints(1, 2), dns_endpoints(1, 2, v6=True))
    with (
        programs(*(echo(pod) for pod in lab6.pods)),
        Proxyd(lab6.node, folder, manifests) as daemon,
    ):
        daemon.wait_listener(VIP6, 53)
        wait_for(lambda: answers(lab6.client, VIP6), "an answer")
        assert {ask(lab6.client, VIP6) for _ in range(4)} == {b"pod-1", b"pod-2"}
        wait_for(lambda: answers(lab6.outside, EXTERNAL_IP6), "an answer")
        for ip, port, host in (
            (VIP6, 53, lab6.client),
            (NODE_IP6, NODE_PORT, lab6.outside),
            (EXTERNAL_IP6, 53, lab6.outside),  # fragments, too
        ):
            for size in (0, 1, 1452, 65_507):
                data = os.urandom(size)
                assert ask(host, ip, port, data) == data


@pytest.mark.parametrize(("text", "ends"), [("1s", True), ("soon", False)])
def test_the_annotation(lab: Lab, manifests: Path, proxyd: Run, text: str, ends: bool) -> None:
    service = dns_service()
    service["metadata"]["annotations"] = {"proxyd.io/udp-idle-timeout": text}
    write(manifests / "dns.yaml", service, dns_endpoints(1))
    with programs(echo(lab.pods[0])):
        daemon = proxyd(flags=("--access-log", str(manifests.parent / "access")))
        daemon.wait_listener(VIP, 53)
        wait_for(lambda: answers(lab.client, VIP), "an answer")

        def idle() -> bool:
            return any('"reason":"idle"' in line for line in lines_of(manifests.parent / "access"))

        if ends:
            wait_for(idle, "the end of the flow")
        else:
            problem = "metadata.annotations[proxyd.io/udp-idle-timeout]"
            wait_for(lambda: problem in daemon.log(), "a warning")
            assert not idle()
        assert daemon.find(VIP, 53)


def test_a_client_outside_is_seen_by_its_address(lab: Lab, manifests: Path, proxyd: Run) -> None:
    """In the connection records; the pod itself sees the node."""
    write(manifests / "dns.yaml", dns_service(), dns_endpoints(1))
    access = manifests.parent / "access"
    with programs(echo(lab.pods[0])):
        daemon = proxyd(flags=("--access-log", str(access), "--udp-timeout", "500ms"))
        daemon.wait_listener(NODE_IP, NODE_PORT)
        wait_for(lambda: answers(lab.outside, NODE_IP, NODE_PORT), "an answer")
        (record,) = records(access, 1)
        assert record["client"].startswith(f"{OUTSIDE_IP}:")
        assert record["protocol"] == "UDP"  # a record without it is of TCP


def test_metrics(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "dns.yaml", dns_service(), dns_endpoints(1))
    with programs(echo(lab.pods[0])), lab.client.socket(kind=socket.SOCK_DGRAM) as client:
        daemon = proxyd(workers=2)
        daemon.wait_listener(VIP, 53)
        wait_for(lambda: answers(lab.client, pod_ip(1), DNS_PORT), "the server")
        client.settimeout(DEADLINE)
        client.connect((VIP, 53))
        for _ in range(50):
            client.send(b"x" * 200)
            assert len(client.recv(500)) == 200
        client.send(b"hush")

        expected = {
            "proxyd_received_datagrams_total": 51,
            "proxyd_received_bytes_total": 50 * 200 + 4,
            "proxyd_sent_datagrams_total": 50,
            "proxyd_sent_bytes_total": 50 * 200,
        }
        wait_for(lambda: expected.items() <= port_figures(lab.node).items(), f"these figures: {expected}")
        got = port_figures(lab.node)
        assert got["proxyd_connections_total"] == 1
        assert got["proxyd_connections_active"] == 1
        assert got["proxyd_flows_evicted_total"] == 0
        # All endpoints refuse: nobody can be told, as the port is open; it is counted.
        write(manifests / "dns.yaml", dns_service(), dns_endpoints(2))
        dropped = "proxyd_datagrams_dropped_total:no_endpoint"

        def refused_by_all() -> bool:
            return not answers(lab.client, VIP) and port_figures(lab.node)[dropped] > 0

        wait_for(refused_by_all, "a datagram that nobody took")
        got = port_figures(lab.node)
        assert not any(value for name, value in got.items() if "dropped" in name and name != dropped)


@pytest.mark.parametrize("how", ["flag", "file"])
def test_the_idle_timeout_of_kube_proxy(
    lab: Lab, folder: Path, manifests: Path, proxyd: Run, how: str
) -> None:
    """250 ms, given explicitly, is what an answered flow gets: far less than what proxyd would choose, 10 s."""
    write(manifests / "dns.yaml", dns_service(), dns_endpoints(1))
    access = folder / "access"
    flags = ("--udp-timeout", "250ms")
    if how == "file":
        config = folder / "config.yaml"
        config.write_text(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nudpIdleTimeout: 250ms\n"
        )
        flags = ("--config", str(config))
    with programs(echo(lab.pods[0])):
        proxyd(flags=("--access-log", str(access), *flags)).wait_listener(VIP, 53)
        wait_for(lambda: answers(lab.client, VIP), "an answer")
        (ended,) = records(access, 1)
        assert ended["reason"] == "idle"
        assert 0.25 <= ended["seconds"] < 10


def test_a_worker_that_dies(lab: Lab, manifests: Path, proxyd: Run) -> None:
    """Datagrams wait in the listener's socket for the next worker; a client goes on from the same port."""
    write(manifests / "dns.yaml", dns_service(), dns_endpoints(1))
    with programs(echo(lab.pods[0])), lab.client.socket(kind=socket.SOCK_DGRAM) as client:
        daemon = proxyd(workers=2)
        daemon.wait_listener(VIP, 53)
        wait_for(lambda: answers(lab.client, VIP), "an answer")
        client.settimeout(DEADLINE)
        client.connect((VIP, 53))
        for i in range(2):
            client.send(b"before %d" % i)
            assert client.recv(100) == b"before %d" % i
            killed = daemon.worker_pids()
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            # None is alive from here on until control starts others: they take what is sent meanwhile.
            wait_for(lambda pids=killed: not any(map(is_alive, pids)), "the end of the workers")
            client.send(b"meanwhile %d" % i)
            assert client.recv(100) == b"meanwhile %d" % i


def test_a_narrow_link_to_the_endpoint(lab: Lab, manifests: Path, proxyd: Run) -> None:
    """A router tells that a datagram is too large for the next link: it goes again in fragments, and no endpoint is blamed."""
    with Namespace("behind") as behind:
        lab.far.sysctl(net__ipv4__ip_forward="1")
        lab.far.ip(
            f"link add name narrow type veth peer name eth0 netns {behind.path}\n"
            "link set narrow mtu 600\naddr add 10.77.0.1/24 dev narrow\nlink set narrow up"
        )
        behind.ip("addr add 10.77.0.2/24 dev eth0\nlink set eth0 mtu 600 up\nroute add default via 10.77.0.1")
        slice_ = dns_endpoints(1)
        slice_["endpoints"] = [{"addresses": ["10.77.0.2"]}]
        write(manifests / "dns.yaml", dns_service(), slice_)
        with programs(echo(behind)):
            proxyd().wait_listener(VIP, 53)
            wait_for(lambda: answers(lab.client, VIP), "an answer")
            data = os.urandom(1200)
            # Nobody knows yet how narrow the link is.
            assert ask(lab.client, VIP, data=data, timeout=DEADLINE) == data
            assert ask(lab.client, VIP, data=data * 10, timeout=DEADLINE) == data * 10
            # Nor do trains of datagrams fit: they are taken apart.
            with lab.client.socket(kind=socket.SOCK_DGRAM) as client:
                client.settimeout(DEADLINE)
                client.connect((VIP, 53))
                for _ in range(2):
                    client.send(b"who")
                    assert client.recv(100) == b"behind"
                client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1200)
                for i in range(20):
                    client.send(bytes([i]) + bytes(32 * 1200 - 1))
                    assert b"".join(client.recv(2000) for _ in range(32)) == bytes([i]) + bytes(32 * 1200 - 1)
            got = figures(lab.node, "proxyd_endpoint_dial_failures_total")
            assert sum(got.values()) == 0
