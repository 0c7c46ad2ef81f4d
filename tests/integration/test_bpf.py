"""bpf(2) and the program that looks up sockets of VIPs, in the kernel, in a namespace of the test's own."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from proxyd.api.service import Protocol, TrafficPolicy
from proxyd.host import parked
from proxyd.host.bpf import syscall as bpf
from proxyd.host.bpf import vip_lookup
from proxyd.host.bpf.assembler import Assembler, R
from proxyd.host.parked import ParkedListeners
from proxyd.host.udp_source import UdpSourcePorts
from proxyd.state.spec import BalancerKey, ListenerKey, ListenerSpec, Role, ServicePortName
from tests.support.netlab import Namespace
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="bpf(2) needs root")

VIP, VIP6 = "10.96.0.10", "fd00:10:96::10"
TCP, UDP = Protocol.TCP, Protocol.UDP


@pytest.fixture
def node() -> Iterator[Namespace]:
    with Namespace("node") as namespace:
        for ip in (f"{VIP}/32", f"{VIP6}/128"):
            namespace.run("ip", "address", "add", ip, "dev", "lo")
        namespace.settle()
        yield namespace


@pytest.fixture
def parked_listeners(node: Namespace) -> Iterator[ParkedListeners]:
    found = node.call(ParkedListeners)
    found.guard({VIP, VIP6})
    yield found
    node.call(found.remove)


def spec(ip: str, port: int, protocol: Protocol = TCP) -> ListenerSpec:
    name = ServicePortName("default", "web", "", protocol)
    return ListenerSpec(
        key=ListenerKey(ip, port, protocol),
        balancer=BalancerKey(name, TrafficPolicy.CLUSTER, 6 if ":" in ip else 4),
        role=Role.CLUSTER_IP,
    )


def opened(node: Namespace, listeners: ParkedListeners, one: ListenerSpec) -> socket.socket:
    sock = node.call(listeners.open, one)
    sock.settimeout(10)
    listeners.admit(one.key, sock)
    return sock


def try_tcp(node: Namespace, ip: str, port: int) -> str:
    """What becomes of a connection: "connected", or the error's name."""
    with node.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as sock:
        sock.settimeout(10)
        try:
            sock.connect((ip, port))
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
        return "connected"


@contextlib.contextmanager
def wildcard(node: Namespace, port: int, kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    with node.socket(socket.AF_INET6, kind) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
        sock.settimeout(10)
        if kind == socket.SOCK_STREAM:
            sock.listen()
        yield sock


@pytest.mark.parametrize("ip", [VIP, VIP6])
def test_a_parked_listener_is_found_beside_a_daemon_at_all_addresses(
    node: Namespace, parked_listeners: ParkedListeners, ip: str
) -> None:
    with wildcard(node, 80) as daemon, opened(node, parked_listeners, spec(ip, 80)) as sock:
        assert sock.getsockname()[1] in parked.PARKING_PORTS
        assert try_tcp(node, ip, 80) == "connected"
        accepted, _ = sock.accept()
        assert accepted.getsockname()[:2] == (ip, 80)
        accepted.close()
        assert try_tcp(node, "127.0.0.1", 80) == "connected"
        daemon.accept()[0].close()
        for port in (sock.getsockname()[1], 22, 65535):
            assert try_tcp(node, ip, port) == "ECONNREFUSED"


@pytest.mark.parametrize("ip", [VIP, VIP6])
def test_udp_ports_are_refused_but_those_listened_on(
    node: Namespace, parked_listeners: ParkedListeners, ip: str
) -> None:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with (
        wildcard(node, 53, socket.SOCK_DGRAM) as daemon,
        opened(node, parked_listeners, spec(ip, 53, UDP)) as sock,
        node.socket(family, socket.SOCK_DGRAM) as client,
    ):
        assert node.call(UdpSourcePorts().sync, parked_listeners.udp_ports) == ""
        client.sendto(b"query", (ip, 53))
        data, address = sock.recvfrom(100)
        assert data == b"query"
        # The client has the VIP as its address: an answer reaches it though its port is none of the VIP's.
        sock.sendto(b"answer", address)
        client.settimeout(10)
        data, address = client.recvfrom(100)
        assert (data, address[:2]) == (b"answer", (ip, 53))
        with node.socket(family, socket.SOCK_DGRAM) as other:
            other.connect((ip, 54))
            other.send(b"query")
            other.settimeout(10)
            with pytest.raises(ConnectionRefusedError):
                other.recv(100)
        daemon.settimeout(0)
        with pytest.raises(BlockingIOError):
            daemon.recv(100)


def test_a_port_goes_from_one_socket_to_another_and_is_refused_without(
    node: Namespace, parked_listeners: ParkedListeners
) -> None:
    one = spec(VIP, 80)
    with wildcard(node, 80):
        first = opened(node, parked_listeners, one)
        second = opened(node, parked_listeners, one)
        assert try_tcp(node, VIP, 80) == "connected"
        second.accept()[0].close()
        first.close()
        assert try_tcp(node, VIP, 80) == "connected"
        second.accept()[0].close()
        duplicate = second.dup()
        second.shutdown(socket.SHUT_RD)  # as control ends a listener that workers have too
        second.close()
        assert try_tcp(node, VIP, 80) == "ECONNREFUSED"
        duplicate.close()
        third = opened(node, parked_listeners, one)
        parked_listeners.refuse(one.key)
        assert try_tcp(node, VIP, 80) == "ECONNREFUSED"
        third.close()
        parked_listeners.refuse(ListenerKey(VIP, 80, Protocol.SCTP))  # which is none of the program's


def test_a_port_is_left_to_who_is_bound_to_it(node: Namespace, parked_listeners: ParkedListeners) -> None:
    with node.listen(VIP, 80) as other:
        assert try_tcp(node, VIP, 80) == "ECONNREFUSED"
        parked_listeners.leave_to_others(ListenerKey(VIP, 80, TCP))
        assert try_tcp(node, VIP, 80) == "connected"
        other.accept()[0].close()
        assert try_tcp(node, VIP, 81) == "ECONNREFUSED"
        with opened(node, parked_listeners, spec(VIP, 80)) as sock:
            assert try_tcp(node, VIP, 80) == "connected"
            sock.accept()[0].close()
    assert try_tcp(node, VIP, 80) == "ECONNREFUSED"


def test_many_ports_of_one_vip(node: Namespace, parked_listeners: ParkedListeners) -> None:
    with contextlib.ExitStack() as stack, wildcard(node, parked.PARKING_PORTS[0]):
        socks = {
            port: stack.enter_context(opened(node, parked_listeners, spec(VIP, port)))
            for port in range(20000, 20400)
        }
        for port in (20000, 20007, 20399):
            assert try_tcp(node, VIP, port) == "connected"
            socks[port].accept()[0].close()


def test_other_addresses_are_guarded_no_more(node: Namespace, parked_listeners: ParkedListeners) -> None:
    with wildcard(node, 22):
        assert [try_tcp(node, ip, 22) for ip in (VIP, VIP6)] == ["ECONNREFUSED", "ECONNREFUSED"]
        parked_listeners.guard({VIP6})
        assert [try_tcp(node, ip, 22) for ip in (VIP, VIP6)] == ["connected", "ECONNREFUSED"]


def test_another_process_goes_on_with_maps_and_link(node: Namespace) -> None:
    with wildcard(node, 22):
        first = node.call(ParkedListeners)
        first.guard({VIP})
        sock = opened(node, first, spec(VIP, 80))
        left = {name: os.dup(descriptor) for name, descriptor in first.descriptors.items()}
        first.close()  # as a process that ends
        assert try_tcp(node, VIP, 22) == "ECONNREFUSED"
        second = node.call(ParkedListeners, left)
        assert try_tcp(node, VIP, 80) == "connected"
        sock.accept()[0].close()
        second.guard(set())  # it knows which addresses are guarded
        assert try_tcp(node, VIP, 22) == "connected"
        node.call(second.remove)
        assert try_tcp(node, VIP, 80) == "ECONNREFUSED"
        sock.close()


def test_what_somebody_else_keeps_is_taken_out_of_force(node: Namespace) -> None:
    first = node.call(ParkedListeners)
    first.guard({VIP})
    kept = {name: os.dup(descriptor) for name, descriptor in first.descriptors.items()}
    node.call(first.remove)
    with wildcard(node, 22):
        assert try_tcp(node, VIP, 22) == "connected"
        # A detached link is of no use: all is made anew.
        second = node.call(ParkedListeners, kept)
        second.guard({VIP})
        assert try_tcp(node, VIP, 22) == "ECONNREFUSED"
        node.call(parked.discard, {name: os.dup(fd) for name, fd in second.descriptors.items()})
        assert try_tcp(node, VIP, 22) == "connected"
        second.close()


def test_a_closed_link_is_gone(node: Namespace) -> None:
    found = node.call(ParkedListeners)
    found.guard({VIP})
    with wildcard(node, 22):
        assert try_tcp(node, VIP, 22) == "ECONNREFUSED"
        found.close()
        assert try_tcp(node, VIP, 22) == "connected"


def test_without_the_interface_the_program_works_too(
    node: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Linux 5.17."""
    whole = vip_lookup.program
    monkeypatch.setattr(vip_lookup, "program", lambda *maps, **_: whole(*maps, interface=False))
    found = node.call(ParkedListeners)
    found.guard({VIP})
    with wildcard(node, 80), opened(node, found, spec(VIP, 80)) as sock:
        assert try_tcp(node, VIP, 80) == "connected"
        sock.accept()[0].close()
        assert try_tcp(node, VIP, 22) == "ECONNREFUSED"
    node.call(found.remove)


def test_the_verifiers_complaint_is_one_line() -> None:
    a = Assembler()
    a.move(R.R0, R.R3)  # never written
    a.exit()
    with pytest.raises(bpf.BpfError) as error:
        bpf.load_program(bpf.SK_LOOKUP, bpf.ATTACH_SK_LOOKUP, bytes(a), "wrong")
    text = error.value.strerror
    assert text is not None
    assert text.startswith("BPF program wrong: the verifier refused it: R3 !read_ok")
    assert "\n" not in text


def test_maps() -> None:
    made = bpf.create_map(bpf.HASH, 4, 1, 2, name="test", flags=bpf.NO_PREALLOC)
    try:
        assert bpf.keys(made, 4) == []
        bpf.update(made, b"aaaa", b"\1")
        bpf.update(made, b"aaaa", b"\2")
        bpf.update(made, b"bbbb", b"\1")
        assert sorted(bpf.keys(made, 4)) == [b"aaaa", b"bbbb"]
        with pytest.raises(bpf.BpfError) as error:
            bpf.update(made, b"cccc", b"\1")
        assert error.value.errno == errno.E2BIG
        assert [bpf.delete(made, b"aaaa"), bpf.delete(made, b"aaaa")] == [True, False]
    finally:
        os.close(made)


def _as_nobody(*capabilities: str) -> str:
    """Why listeners can't be parked by a user with these capabilities; "" where they can."""
    script = (
        "from proxyd.host import parked\n"
        "try:\n"
        "    parked.ParkedListeners().remove()\n"
        "except OSError as error:\n"
        "    print(parked.why_not(error))\n"
    )
    given = ",".join(f"+{name}" for name in capabilities)
    options = [f"--inh-caps={given}", f"--ambient-caps={given}"] if given else []
    done = subprocess.run(
        [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            *options,
            sys.executable,
            "-c",
            script,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (("bpf", "net_admin", "net_bind_service"), ""),
        (("net_admin", "net_bind_service"), "bpf(2) needs CAP_BPF and CAP_NET_ADMIN"),
        (("bpf",), "bpf(2) needs CAP_BPF and CAP_NET_ADMIN"),
        ((), "bpf(2) needs CAP_BPF and CAP_NET_ADMIN"),
    ],
)
def test_which_capabilities_it_takes(node: Namespace, capabilities: tuple[str, ...], expected: str) -> None:
    assert node.call(_as_nobody, *capabilities) == expected


def test_why_it_is_refused() -> None:
    assert parked.why_not(OSError(errno.ENOSYS, "x")).startswith("bpf(2) is not available")
    assert parked.why_not(OSError(errno.EINVAL, "x")).startswith("the kernel has no programs")
    assert parked.why_not(OSError(errno.EPERM, "x")).startswith("bpf(2) is not permitted")
