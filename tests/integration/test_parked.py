"""VIPs on a node where other daemons listen at all addresses: both work, whoever comes first, and other ports are refused."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import dns
from tests.support.clients import Load, answer, ask, connect, refused
from tests.support.daemon import Proxyd
from tests.support.manifests import endpoints, service, write
from tests.support.netlab import BRIDGE_IP, NODE_IP, NODE_IP6, Lab, Namespace
from tests.support.waiting import wait_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="bpf(2) needs root: nothing is parked")
VIP, VIP6 = "10.96.0.10", "fd00:10:96::10"
Run = Callable[..., Proxyd]


@pytest.fixture
def bridged(lab: Lab) -> Lab:
    """A node whose bridge hands what crosses it to netfilter, where the kernel has that."""
    with contextlib.suppress(OSError, RuntimeError):
        lab.node.run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=1")
    return lab


@pytest.fixture(autouse=True)
def bpf_fs() -> Iterator[None]:
    """The BPF file system, which systemd mounts at boot, where this machine has not."""
    if Path("/sys/fs/bpf").is_mount():
        yield
        return
    subprocess.run(["mount", "-t", "bpf", "bpf", "/sys/fs/bpf"], check=True)
    yield
    subprocess.run(["umount", "/sys/fs/bpf"], check=True)


@contextlib.contextmanager
def at_all_addresses(
    node: Namespace, *ports: int, kind: int = socket.SOCK_STREAM
) -> Iterator[list[socket.socket]]:
    """A daemon of the node that listens at [::], IPv4 included."""
    with contextlib.ExitStack() as stack:
        found = []
        for port in ports:
            sock = stack.enter_context(node.socket(socket.AF_INET6, kind))
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(("::", port))
            if kind == socket.SOCK_STREAM:
                sock.listen()
            found.append(sock)
        yield found


def web(manifests: Path, *pods: int, **spec: object) -> None:
    write(manifests / "web.yaml", service("web", VIP, **spec), endpoints("web", *(pods or (1,))))


def clients(lab: Lab) -> list[Namespace]:
    return [lab.node, lab.client, lab.outside]


@pytest.mark.parametrize("first", ["daemon", "proxyd"])
def test_a_daemon_at_all_addresses_and_a_vip_have_the_same_port(
    bridged: Lab, manifests: Path, proxyd: Run, first: str
) -> None:
    lab = bridged
    lab.outside.run("ip", "route", "replace", "10.96.0.0/16", "via", NODE_IP)
    web(manifests)
    with contextlib.ExitStack() as stack:
        if first == "daemon":
            stack.enter_context(at_all_addresses(lab.node, 80, 22))
        daemon = proxyd()
        daemon.wait_listener(VIP, 80)
        if first == "proxyd":
            assert ask(lab.client, VIP, 80) == "pod-1"
            stack.enter_context(at_all_addresses(lab.node, 80, 22))
        for client in clients(lab):
            assert ask(client, VIP, 80) == "pod-1"
            assert refused(client, VIP, 22)
            assert refused(client, VIP, 4)  # where it is parked
        with lab.client.socket() as sock:
            sock.settimeout(10)
            sock.connect((BRIDGE_IP, 80))  # the node's own daemon
        assert daemon.stop() == 0


def test_no_endpoints_is_a_refusal_beside_a_daemon_at_all_addresses(
    lab: Lab, manifests: Path, proxyd: Run
) -> None:
    web(manifests)
    with at_all_addresses(lab.node, 80):
        daemon = proxyd()
        daemon.wait_listener(VIP, 80)
        write(manifests / "web.yaml", service("web", VIP))
        daemon.wait_listener(VIP, 80, "NoEndpoints")
        assert refused(lab.client, VIP, 80)
        web(manifests, 2)
        daemon.wait_listener(VIP, 80)
        assert ask(lab.client, VIP, 80) == "pod-2"
        (manifests / "web.yaml").unlink()
        daemon.wait_listeners(lambda found: not found, "no Service")


def test_who_is_bound_to_a_vip_itself_keeps_it(lab: Lab, manifests: Path, proxyd: Run) -> None:
    lab.node.run("ip", "address", "add", f"{VIP}/32", "dev", "lo")
    lab.node.run("ip", "route", "del", "local", VIP, "dev", "lo", "table", "local")
    lab.node.run("ip", "address", "del", f"{VIP}/32", "dev", "lo")
    web(manifests)
    daemon = proxyd(flags=("--sync-period", "1s"))
    daemon.wait_listener(VIP, 80)
    # Now VIP:80 is free to bind: it is bound, as NodeLocal DNSCache binds the VIP of kube-dns.
    with lab.node.listen(VIP, 80) as other:
        held = daemon.wait_listener(VIP, 80, "Failed")
        assert f"(pid {os.getpid()})" in held.detail
        with lab.client.socket() as sock:
            sock.settimeout(10)
            sock.connect((VIP, 80))
            other.settimeout(10)
            other.accept()[0].close()
        assert refused(lab.client, VIP, 22)
    daemon.wait_listener(VIP, 80)
    wait_for(lambda: answer(lab.client, VIP, 80) == "pod-1", "the Service again")


def test_a_vip_stays_guarded_when_control_is_killed(lab: Lab, manifests: Path, folder: Path) -> None:
    web(manifests)
    with at_all_addresses(lab.node, 22, 80):
        with Proxyd(lab.node, folder, manifests) as daemon:
            daemon.wait_listener(VIP, 80)
            workers = daemon.worker_pids()
            daemon.signal(signal.SIGKILL)
            daemon.wait()
            assert refused(lab.client, VIP, 22)
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            wait_for(lambda: refused(lab.client, VIP, 80), "a refusal")
            assert refused(lab.client, VIP, 22)
            assert refused(lab.node, VIP, 22)
        with Proxyd(lab.node, folder, manifests) as daemon:
            daemon.wait_listener(VIP, 80)
            assert ask(lab.client, VIP, 80) == "pod-1"
            assert refused(lab.client, VIP, 22)
            daemon.signal(signal.SIGKILL)
            daemon.wait()
            done = daemon.cli("cleanup")
            assert done.returncode == 0, done.stderr
            assert not Path(f"/sys/fs/bpf/proxyd-{Path(lab.node.path).stat().st_ino}").exists()


@pytest.mark.parametrize("how", ["parked", "bound"])
def test_how_vips_are_listened_at_can_be_chosen(lab: Lab, manifests: Path, proxyd: Run, how: str) -> None:
    web(manifests)
    with at_all_addresses(lab.node, 80):
        daemon = proxyd(flags=("--vip-listen", how))
        state = "Serving" if how == "parked" else "Failed"
        held = daemon.wait_listener(VIP, 80, state)
        assert (f"(pid {os.getpid()})" in held.detail) == (how == "bound")
        assert daemon.status()["vipListen"] == how


@pytest.mark.parametrize("first", ["daemon", "proxyd"])
def test_udp_and_ipv6_beside_daemons_at_all_addresses(
    lab6: Lab, manifests: Path, folder: Path, first: str
) -> None:
    lab = lab6
    lab.outside.run("ip", "route", "replace", f"{dns.VIP}/32", "via", NODE_IP)
    lab.outside.run("ip", "-6", "route", "replace", f"{dns.VIP6}/128", "via", NODE_IP6)
    write(
        manifests / "dns.yaml",
        dns.dns_service(clusterIPs=[dns.VIP, dns.VIP6]),
        *(dns.dns_endpoints(1, v6=v6) for v6 in (False, True)),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(dns.programs(dns.echo(lab.pods[0])))

        # Where the first listener of a VIP would be parked, somebody else may be.
        ports = (53, 4) if first == "daemon" else (53,)

        def others() -> list[socket.socket]:
            udp = stack.enter_context(at_all_addresses(lab.node, *ports, kind=socket.SOCK_DGRAM))
            return [*udp, *stack.enter_context(at_all_addresses(lab.node, 53))]

        if first == "daemon":
            theirs = others()
        daemon = stack.enter_context(Proxyd(lab.node, folder, manifests))
        for vip in (dns.VIP, dns.VIP6):
            daemon.wait_listener(vip, 53)
        if first == "proxyd":
            theirs = others()
        for client in clients(lab):
            for vip in (dns.VIP, dns.VIP6):
                for size in (1, 1400, 9000, 40000):
                    for connected in (True, False):
                        assert echoed(client, vip, size, connected=connected)
        for sock in theirs:
            sock.settimeout(0)
            with pytest.raises(BlockingIOError):
                sock.recv(1) if sock.type == socket.SOCK_DGRAM else sock.accept()


def echoed(client: Namespace, ip: str, size: int, *, connected: bool) -> bool:
    """Whether a datagram comes back from the address that it was sent to."""
    data = os.urandom(size)
    with client.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        if connected:
            sock.connect((ip, 53))
            sock.send(data)
            return sock.recv(65535) == data
        sock.sendto(data, (ip, 53))
        came, address = sock.recvfrom(65535)
        return (came, address[:2]) == (data, (ip, 53))


def config(folder: Path, how: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
        f"proxyd: {{vipListen: {how}}}\n"
    )
    return file


@pytest.mark.parametrize(("before", "after"), [("bound", "parked"), ("parked", "parked")])
def test_an_upgrade_loses_nobody(lab: Lab, manifests: Path, proxyd: Run, before: str, after: str) -> None:
    folder = manifests.parent
    web(manifests, 1, 2)
    daemon = proxyd(workers=2, flags=("--config", str(config(folder, before))))
    daemon.wait_listener(VIP, 80)
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(connect(lab.client, VIP, 80))
        load = stack.enter_context(Load(lab.client, VIP, 80, clients=4))
        load.wait_more(50)
        config(folder, after)
        assert daemon.cli("upgrade").returncode == 0, daemon.log()
        daemon.wait_listener(VIP, 80)
        assert daemon.status()["vipListen"] == after
        load.wait_more(50)
        if after == "parked":
            # The sockets that the program before bound are gone in a moment, and the port is free.
            wait_for(lambda: can_bind(lab.node, 80), "the port of all addresses")
            stack.enter_context(at_all_addresses(lab.node, 80))
        load.wait_more(50)
        kept.sendall(b"who\n")
        assert kept.recv(100)
    assert (load.outcome.refused, load.outcome.broken) == ([], [])
    assert refused(lab.client, VIP, 22)
    assert daemon.stop() == 0


def can_bind(node: Namespace, port: int) -> bool:
    try:
        with at_all_addresses(node, port):
            return True
    except OSError:
        return False


def test_a_killed_worker_leaves_its_clients_in_the_backlog(lab: Lab, manifests: Path, proxyd: Run) -> None:
    web(manifests)
    with at_all_addresses(lab.node, 80):
        daemon = proxyd(workers=1)
        daemon.wait_listener(VIP, 80)
        (victim,) = daemon.worker_pids()
        os.kill(victim, signal.SIGKILL)
        assert ask(lab.client, VIP, 80, timeout=30) == "pod-1"


def test_what_is_left_parked_does_not_refuse_who_binds(lab: Lab, manifests: Path, folder: Path) -> None:
    """After a kill, with --vip-listen=bound."""
    web(manifests)
    with Proxyd(lab.node, folder, manifests) as daemon:
        daemon.wait_listener(VIP, 80)
        daemon.signal(signal.SIGKILL)
        daemon.wait()
    with Proxyd(lab.node, folder, manifests, flags=("--vip-listen", "bound")) as daemon:
        daemon.wait_listener(VIP, 80)
        assert ask(lab.client, VIP, 80) == "pod-1"
        assert refused(lab.client, VIP, 22)


def set_checksums(node: Namespace, device: str, *, on: bool) -> None:
    """As `ethtool -K DEVICE tx on|off`."""

    def change() -> None:
        value = array.array("I", [0x17, int(on)])  # ETHTOOL_STXCSUM of linux/ethtool.h
        request = device.encode().ljust(16, b"\0") + struct.pack("@P", value.buffer_info()[0]) + bytes(16)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, 0x8946, request)  # SIOCETHTOOL of linux/sockios.h

    node.call(change)


# Answers each datagram with as many buffers of 20 segments as it has bytes, as QUIC servers send them.
_BULK = f"""
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("0.0.0.0", {dns.DNS_PORT}))
sock.setsockopt(socket.IPPROTO_UDP, 103, 1200)  # UDP_SEGMENT of linux/udp.h
while True:
    data, peer = sock.recvfrom(65536)
    for _ in data:
        sock.sendto(bytes(range(240)) * 5 * 20, peer)
"""


@pytest.mark.parametrize("when", ["before", "later"])
def test_bulk_over_a_device_that_makes_no_checksums(
    lab: Lab, manifests: Path, proxyd: Run, when: str
) -> None:
    lab.outside.run("ip", "route", "replace", f"{dns.VIP}/32", "via", NODE_IP)
    write(manifests / "dns.yaml", dns.dns_service(), dns.dns_endpoints(1))
    if when == "before":
        set_checksums(lab.node, "out0", on=False)
    server = lab.pods[0].popen([sys.executable, "-c", _BULK])
    with dns.programs(server), lab.outside.socket(kind=socket.SOCK_DGRAM) as client:
        wait_for(lambda: dns.listens(lab.pods[0]), "the server")
        daemon = proxyd()
        daemon.wait_listener(dns.VIP, 53)
        client.settimeout(2)
        client.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE
        client.connect((dns.VIP, 53))

        def whole(rounds: int) -> bool:
            """Whether all segments come; after some rounds the relay sends them on as it gets them."""
            for _ in range(rounds):
                client.send(bytes(3))
                for _ in range(3 * 20):
                    try:
                        if client.recv(2000) != bytes(range(240)) * 5:
                            return False
                    except TimeoutError:
                        return False
            return True

        assert whole(20)
        if when == "later":
            set_checksums(lab.node, "out0", on=False)
            wait_for(lambda: whole(3), "whole answers")
        assert whole(20)
