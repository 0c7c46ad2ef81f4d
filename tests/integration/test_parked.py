"""VIPs on a node where other daemons listen at all addresses: both work, whoever comes first, and other ports are refused."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.clients import answer, ask, refused
from tests.support.daemon import Proxyd
from tests.support.manifests import endpoints, service, write
from tests.support.netlab import BRIDGE_IP, NODE_IP, Lab, Namespace
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
            assert not [path for path in Path("/sys/fs/bpf").iterdir() if path.name.startswith("proxyd-")]


@pytest.mark.parametrize("how", ["parked", "bound"])
def test_how_vips_are_listened_at_can_be_chosen(lab: Lab, manifests: Path, proxyd: Run, how: str) -> None:
    web(manifests)
    with at_all_addresses(lab.node, 80):
        daemon = proxyd(flags=("--vip-listen", how))
        state = "Serving" if how == "parked" else "Failed"
        held = daemon.wait_listener(VIP, 80, state)
        assert (f"(pid {os.getpid()})" in held.detail) == (how == "bound")
        assert daemon.status()["vipListen"] == how
