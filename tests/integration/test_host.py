"""The host room on a real kernel: every test changes namespaces of its own only."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import resource
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import uvloop

from proxyd.host import cleanup, limits
from proxyd.host.addresses import node_addresses
from proxyd.host.guard import VipGuard
from proxyd.host.kubeproxy import kube_proxy_leftovers
from proxyd.host.monitor import News, NodeMonitor
from proxyd.host.routes import VipRoutes, is_local
from proxyd.host.sockets import BindFailed, open_listener
from proxyd.host.steering import Steering
from proxyd.state.snapshot import NodeAddress
from proxyd.state.spec import ListenerSpec
from proxyd.state.spec import Steering as Action
from tests.support.daemon import UNPRIVILEGED
from tests.support.host import FORBIDDEN, REFUSED, SILENCE, Naming, daemon_socket, key, question, spec
from tests.support.netlab import (
    CLIENT_POD_IP,
    EXTERNAL_IP,
    EXTERNAL_IP6,
    NODE_FAR_IP,
    NODE_IP,
    NODE_IP6,
    OUTSIDE_IP,
    Lab,
    Namespace,
    routes_and_rules,
)
from tests.support.waiting import DEADLINE, wait_for

VIP, VIP6 = "10.96.0.10", "fd96::10"
VIPS = (VIP, VIP6)
EXTERNALS = (EXTERNAL_IP, EXTERNAL_IP6)
BOTH = ("TCP", "UDP")
DGRAM = socket.SOCK_DGRAM
FAMILIES = (socket.AF_INET, socket.AF_INET6)


@pytest.fixture
def space() -> Iterator[Namespace]:
    with Namespace("host") as made:
        made.ip("link add name d0 type bridge\naddr add 10.0.0.1/24 dev d0\nlink set d0 up")
        made.settle()
        yield made


@pytest.fixture
def naming() -> Iterator[Naming]:
    with Naming() as made:
        yield made


@pytest.fixture
def town() -> Iterator[Lab]:
    """The lab with IPv6, and the far host reached through the node at both external addresses."""
    with Lab(1, ipv6=True) as lab:
        lab.reach_far_by_ipv6()
        yield lab


def opened(namespace: Namespace, wish: ListenerSpec) -> socket.socket:
    return namespace.call(open_listener, wish)


def guarded_node(town: Lab, naming: Naming) -> VipGuard:
    """Both VIPs with a service at port 80, an sshd on all addresses, and the guard."""
    node = town.node
    assert node.call(VipRoutes().add, VIPS) == {}
    for ip in VIPS:
        for protocol in BOTH:
            naming.add(opened(node, spec(ip, 80, protocol)), "service")
    for ip in ("0.0.0.0", "::"):
        naming.add(daemon_socket(node, ip, 22), "sshd")
        naming.add(daemon_socket(node, ip, 22, DGRAM), "sshd")
    guard = VipGuard()
    assert node.call(guard.available) is None
    ports = frozenset(key(ip, 80, protocol) for ip in VIPS for protocol in BOTH)
    assert node.call(guard.sync, frozenset(VIPS), ports) is None
    return guard


# VIP routes


def test_routes_are_added_found_and_removed_without_a_trace(space: Namespace) -> None:
    before = routes_and_rules(space)
    routes = VipRoutes()
    vips = [f"10.96.{i >> 8}.{i & 255}" for i in range(1000)] + [f"fd96::{i:x}" for i in range(1, 1000)]
    assert space.call(routes.add, vips) == {}
    assert space.call(VipRoutes().present) == frozenset(vips)
    assert space.call(routes.add, vips) == {}, "a route that exists already is no failure"
    assert space.call(routes.remove, vips) == {}
    assert space.call(routes.remove, vips) == {}, "a route that is gone already is no failure"
    assert space.call(routes.present) == frozenset()
    assert routes_and_rules(space) == before


def test_an_address_of_the_node_is_neither_added_nor_removed(space: Namespace) -> None:
    space.ip("addr add fd09::1/64 dev d0 nodad")
    space.settle()
    before = routes_and_rules(space)
    routes, own = VipRoutes(), ["10.0.0.1", "fd09::1", "127.0.0.1"]
    assert space.call(routes.add, own) == {}
    assert space.call(routes.present) == frozenset()
    assert space.call(routes.remove, own) == {}
    assert routes_and_rules(space) == before


def test_a_route_of_somebody_else_is_not_removed(space: Namespace) -> None:
    space.ip("route add local 10.96.0.1/32 dev lo table local proto static")
    assert space.call(VipRoutes().present) == frozenset()
    assert space.call(VipRoutes().remove, ["10.96.0.1"]) == {}
    assert space.call(is_local, "10.96.0.1")


def test_one_bad_address_does_not_stop_the_others(space: Namespace) -> None:
    # An address that cannot be local stands in the middle of the batch.
    failed = space.call(VipRoutes().add, ["10.96.0.1", "nonsense", "ff02::1%x", "10.96.0.2"])
    assert set(failed) == {"nonsense", "ff02::1%x"}
    assert all(len(line.splitlines()) == 1 for line in failed.values())
    assert space.call(VipRoutes().present) == {"10.96.0.1", "10.96.0.2"}


def test_each_failing_message_of_a_batch_gets_its_own_reason() -> None:
    with Namespace("down") as space:
        space.ip("link set lo down")
        # Over IPv6 the kernel makes no route on an interface that is down; over IPv4 it does.
        good, bad = [f"10.96.1.{i}" for i in range(200)], [f"fd96::{i:x}" for i in range(200)]
        failed = space.call(VipRoutes().add, [ip for pair in zip(good, bad, strict=True) for ip in pair])
        assert set(failed) == set(bad)
        assert {line.partition("local: ")[2] for line in failed.values()} == {
            "Network is down: Nexthop device is not up: the interface `lo` is down; `ip link set lo up`"
        }
        assert space.call(VipRoutes().present) == set(good)


def test_netlink_works_within_a_running_loop(space: Namespace) -> None:
    async def control() -> tuple[frozenset[str], bool]:
        loop = asyncio.get_running_loop()
        monitor, changed = NodeMonitor(), asyncio.Event()
        (descriptor,) = monitor.descriptors
        loop.add_reader(descriptor, lambda: monitor.drain().addresses and changed.set())
        assert not monitor.drain()
        try:
            assert VipRoutes().add([VIP]) == {}
            present = VipRoutes().present()
            subprocess.run(["ip", "addr", "add", "10.0.0.2/24", "dev", "d0"], check=True)  # noqa: ASYNC221 - short
            await asyncio.wait_for(changed.wait(), 30)
        finally:
            loop.remove_reader(descriptor)
            monitor.close()
        return present, "10.0.0.2" in {address.ip for address in node_addresses()}

    assert space.call(uvloop.run, control()) == ({VIP}, True)


# The node's addresses


def test_node_addresses(space: Namespace) -> None:
    space.sysctl(net__ipv6__conf__default__accept_dad="1")
    space.ip(
        "link add name d1 type bridge\nlink set d1 up\naddr add 10.1.0.1/24 dev d1\naddr add 10.1.0.2/24 dev d1\n"
        "link add name d2 type bridge\naddr add 10.2.0.1/24 dev d2\n"  # down
        "link add name p0 type bridge\nlink set p0 up\naddr add 10.3.0.1 peer 10.3.0.2/32 dev p0\n"
        "addr add fd09::1/64 dev d1 nodad\naddr add 10.0.0.1/32 dev d1\n"
        # Duplicate address detection never ends on a link without a carrier.
        "link add name v0 type veth peer name v1\nlink set v0 up\naddr add fd09::bad/64 dev v0\n"
        "route add default via 10.1.0.9 src 10.1.0.2\nroute add default via fd09::9"
    )
    space.call(VipRoutes().add, VIPS)
    found = {address.ip: address for address in space.call(node_addresses)}
    assert {ip: address.interface for ip, address in found.items()} == {
        "127.0.0.1": "lo",
        "::1": "lo",
        "10.0.0.1": "d0",
        "10.1.0.1": "d1",
        "10.1.0.2": "d1",
        "10.3.0.1": "p0",
        "fd09::1": "d1",
    }
    assert {ip for ip, address in found.items() if address.primary} == {"10.1.0.2", "fd09::1"}


def test_the_primary_address_without_a_default_route(space: Namespace) -> None:
    primary = [address for address in space.call(node_addresses) if address.primary]
    assert primary == [NodeAddress(ip="10.0.0.1", interface="d0", primary=True)]


@pytest.fixture
def monitored() -> Iterator[tuple[Namespace, NodeMonitor]]:
    """A quiet namespace and its monitor."""
    # Only the loopback interface: of others the kernel tells later too, when their carrier or IPv6 has settled.
    with Namespace("monitor") as space:
        monitor = space.call(NodeMonitor, tables=True)
        wait_for(lambda: not monitor.drain(), "quiet")
        yield space, monitor
        monitor.close()


def test_the_monitor_tells_of_changes_and_of_lost_news(monitored: tuple[Namespace, NodeMonitor]) -> None:
    space, monitor = monitored
    for change in ("add", "del"):
        space.ip(f"addr {change} 10.0.0.3/24 dev lo")
        assert monitor.drain() == News(addresses=True)
        assert not monitor.drain()
    # More news than the socket can hold.
    space.ip("addr add 10.0.0.3/24 dev lo\naddr del 10.0.0.3/24 dev lo\n" * 1500)
    assert monitor.drain() == News(addresses=True, routes=True, rules=True, overflow=True)
    assert not monitor.drain()


def test_the_monitor_tells_what_others_remove_and_not_what_proxyd_does(
    monitored: tuple[Namespace, NodeMonitor],
) -> None:
    space, monitor = monitored
    routes, guard, steering = VipRoutes(), VipGuard(), Steering()
    steered = {key(EXTERNAL_IP, 80): Action.LOCAL}

    def make() -> None:
        assert routes.add(VIPS) == {}
        assert guard.sync(frozenset(VIPS), frozenset({key(VIP, 80)})) is None
        assert steering.sync(steered) == {}

    def take_away() -> None:
        assert steering.sync({}) == {}
        assert guard.remove() is None
        assert routes.remove(VIPS) == {}

    for change in (make, take_away, make):
        space.call(change)
        assert not monitor.drain(), change
    mark = "fwmark 0x1000/0x1000 lookup 7112"
    for command, news in (
        (f"ip route del local {VIP} dev lo table local", News(routes=True)),
        (f"ip route del local {VIP6} dev lo table local", News(routes=True)),
        (f"ip rule del pref 112 {mark}", News(rules=True)),
        ("nft flush set inet proxyd vips4", News(tables=frozenset({"proxyd"}))),
        ("nft flush ruleset", News(tables=frozenset({"proxyd", "proxyd-steering"}))),
        # What is not proxyd's, and what is only added.
        (f"ip route add local {VIP} dev lo table local proto 112", News()),
        (f"ip rule add pref 112 {mark} protocol 112", News()),
        ("ip route add local 10.97.0.1 dev lo proto static", News()),
        ("ip route del local 10.97.0.1 dev lo proto static", News()),
        ("ip rule add pref 200 lookup 200; ip rule del pref 200", News()),
        ("nft add table inet proxyd; nft add table ip others; nft delete table ip others", News()),
    ):
        space.run("sh", "-c", command)
        assert monitor.drain() == news, command
    # A daemon of routes: thousands of its routes are no news.
    space.ip(
        "route add local 10.97.0.1 dev lo proto bird\nroute del local 10.97.0.1 dev lo proto bird\n" * 3000
    )
    assert not monitor.drain()


# Sockets


def test_options_that_accepted_sockets_inherit(space: Namespace) -> None:
    space.call(VipRoutes().add, VIPS)
    for ip in ("127.0.0.1", "::1", *VIPS):
        with opened(space, spec(ip, 8000)) as listener:
            assert not listener.getblocking()
            assert not listener.get_inheritable()
            assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
            with space.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as client:
                client.connect((ip, 8000))
                accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 15
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 4


def test_both_families_can_have_the_same_port_at_all_addresses(space: Namespace) -> None:
    with opened(space, spec("::", 8000)), opened(space, spec("0.0.0.0", 8000)):
        pass


@pytest.mark.parametrize("protocol", BOTH)
@pytest.mark.parametrize("held", ["0.0.0.0", "::", VIP, f"::ffff:{VIP}"])
def test_a_port_in_use_names_the_process(space: Namespace, protocol: str, held: str) -> None:
    space.call(VipRoutes().add, [VIP])
    kind = DGRAM if protocol == "UDP" else socket.SOCK_STREAM
    with space.socket(FAMILIES[":" in held], kind) as other:
        other.bind((held, 8000))
        if protocol == "TCP":
            other.listen()
        failures: list[BindFailed] = []

        def named() -> bool:
            with pytest.raises(BindFailed, match=r"^in use by ") as failed:
                opened(space, spec(VIP, 8000, protocol))
            failures.append(failed.value)
            return re.match(rf"in use by .+ \(pid {os.getpid()}\): ", str(failed.value)) is not None

        # The search is bounded in time, so on a busy machine it may take more than one attempt, as in the daemon.
        wait_for(named, "the process is named")
    assert failures[-1].retryable
    opened(space, spec(VIP, 8000, protocol)).close()


OUTGOING = (
    r"in use by an outgoing connection of .+ \(pid {pid}\) to 10\.0\.0\.1:9000: "
    r"`sysctl net\.ipv4\.ip_local_reserved_ports` keeps ports for listeners"
)


@pytest.mark.parametrize("protocol", BOTH)
@pytest.mark.parametrize("mapped", [False, True], ids=["IPv4", "IPv4 in IPv6"])
def test_a_port_of_an_outgoing_connection_is_told_as_one(
    space: Namespace, protocol: str, mapped: bool
) -> None:
    """The kernel gives outgoing connections NodePorts too where its range is wide."""
    space.sysctl(net__ipv4__ip_local_port_range="30080 30080")
    kind = DGRAM if protocol == "UDP" else socket.SOCK_STREAM
    with space.listen("10.0.0.1", 9000), space.socket(FAMILIES[mapped], kind) as client:
        client.connect(("::ffff:10.0.0.1" if mapped else "10.0.0.1", 9000))

        def told() -> bool:
            with pytest.raises(BindFailed) as failed:
                opened(space, spec("10.0.0.1", 30080, protocol))
            return bool(re.fullmatch(OUTGOING.format(pid=os.getpid()), str(failed.value)))

        # As above.
        wait_for(told, "the process is named")
    if protocol == "UDP":
        opened(space, spec("10.0.0.1", 30080, protocol)).close()


def test_a_port_of_a_connection_that_has_ended_is_told_as_one(space: Namespace) -> None:
    space.sysctl(net__ipv4__ip_local_port_range="30080 30080")
    with space.listen("10.0.0.1", 9000) as server, space.socket() as client:
        client.connect(("10.0.0.1", 9000))
        accepted, _ = server.accept()
        client.close()
        accepted.close()
        with pytest.raises(
            BindFailed, match=r"an outgoing connection to 10\.0\.0\.1:9000 that has just ended: "
        ):
            opened(space, spec("10.0.0.1", 30080))


@pytest.mark.parametrize("ip", VIPS)
def test_an_address_that_is_not_the_nodes(space: Namespace, ip: str) -> None:
    with pytest.raises(BindFailed, match=f"{ip} is not an address of this node: .*--vip-mode=route") as told:
        opened(space, spec(ip, 80))
    assert "root" not in str(told.value)


def test_descriptors_that_ran_out(space: Namespace) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_free = os.dup(0)
    os.close(next_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_free, hard))
    try:
        with pytest.raises(BindFailed, match="out of file descriptors: raise LimitNOFILE") as failed:
            opened(space, spec("127.0.0.1", 8000))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert failed.value.retryable
    assert failed.value.exhausted


NO_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
# The root of another user namespace has all capabilities, for which the node's network does not care.
STRANGER = ("unshare", "--user", "--map-root-user")


@pytest.mark.parametrize(
    ("who", "admin", "bind"),
    [
        (UNPRIVILEGED, "run as root or with CAP_NET_ADMIN", "run as root or with CAP_NET_BIND_SERVICE"),
        (
            NO_CAPABILITIES,
            "root lacks CAP_NET_ADMIN here: give it to the container or the unit",
            "root lacks CAP_NET_BIND_SERVICE here: give it to the container or the unit",
        ),
        (
            STRANGER,
            "CAP_NET_ADMIN does not help here: a user namespace or a security policy is in the way",
            "CAP_NET_BIND_SERVICE does not help here: a user namespace or a security policy is in the way",
        ),
    ],
    ids=["a-user", "root-without-capabilities", "root-of-another-namespace"],
)
def test_what_an_unprivileged_process_is_told(
    space: Namespace, who: tuple[str, ...], admin: str, bind: str
) -> None:
    """Root is not told to be root."""
    script = textwrap.dedent(
        """
        from tests.support.host import key, spec
        from proxyd.host import limits
        from proxyd.host.guard import VipGuard
        from proxyd.host.routes import VipRoutes
        from proxyd.host.sockets import BindFailed, open_listener
        for wish in (spec("127.0.0.1", 80), spec("80.11.12.10", 8080, steered=True)):
            try:
                open_listener(wish)
            except BindFailed as error:
                print(error)
        print(limits.can_route())
        print(VipGuard().available())
        print(VipRoutes().add(["10.96.0.10"])["10.96.0.10"])
        """
    )
    assert space.run(*who, sys.executable, "-c", script).splitlines() == [
        f"port 80 is privileged: {bind}; or `sysctl net.ipv4.ip_unprivileged_port_start=80`",
        f"80.11.12.10 is not an address of this node, and may not be bound: {admin}",
        "False",
        f"nftables may not be used: {admin}",
        f"cannot make 10.96.0.10 local: Operation not permitted: {admin}",
    ]


def test_limits(space: Namespace) -> None:
    before = routes_and_rules(space)
    assert space.call(limits.can_route)
    assert limits.raise_nofile() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert routes_and_rules(space) == before


# The VIP guard


def test_vips_answer_at_service_ports_only(town: Lab, naming: Naming) -> None:
    guarded_node(town, naming)
    for host in (town.node, town.client, town.outside):
        for ip in VIPS:
            for protocol in BOTH:
                assert question(host, ip, 80, protocol).startswith("service"), (host.name, ip, protocol)
                assert question(host, ip, 22, protocol) == REFUSED, (host.name, ip, protocol)
                assert question(host, ip, 23, protocol) == REFUSED, (host.name, ip, protocol)
        # The answer to a socket that is not connected, and with that bound to all addresses.
        assert question(host, VIP, 80, "UDP", connected=False).startswith("service")
        for ip in (NODE_IP, NODE_IP6):
            assert question(host, ip, 22).startswith("sshd")
    assert question(town.client, VIP, 80) == f"service {CLIENT_POD_IP}"


def test_what_exists_already_is_not_broken(town: Lab, naming: Naming) -> None:
    guard = guarded_node(town, naming)
    node = town.node
    # The node's own connections from a VIP get their answers.
    naming.add(daemon_socket(town.far, EXTERNAL_IP, 81), "far")
    naming.add(daemon_socket(town.far, EXTERNAL_IP, 81, DGRAM), "far")
    for protocol in BOTH:
        assert question(node, EXTERNAL_IP, 81, protocol, source=VIP) == f"far {VIP}"
    # A relay of a service port that is removed goes on; new ones are refused.
    listener = opened(node, spec(VIP, 90))
    everything = frozenset(key(ip, 80, protocol) for ip in VIPS for protocol in BOTH)
    assert node.call(guard.sync, frozenset(VIPS), everything | {key(VIP, 90)}) is None
    with town.client.socket() as client:
        client.settimeout(DEADLINE)
        client.connect((VIP, 90))
        accepted, _ = listener.accept()
        with accepted, listener:
            assert node.call(guard.sync, frozenset(VIPS), everything) is None
            assert question(town.client, VIP, 90) == REFUSED
            client.sendall(b"to")
            accepted.settimeout(DEADLINE)
            assert accepted.recv(10) == b"to"
            accepted.sendall(b"fro")
            assert client.recv(10) == b"fro"


def test_the_guard_follows_small_changes_and_comes_back_after_a_flush(town: Lab, naming: Naming) -> None:
    guard = guarded_node(town, naming)
    node = town.node
    ports = frozenset(key(ip, 80, protocol) for ip in VIPS for protocol in BOTH)
    assert node.call(guard.sync, frozenset(VIPS), ports | {key(VIP, 22)}) is None
    assert question(town.client, VIP, 22).startswith("sshd")
    assert question(town.client, VIP6, 22) == REFUSED
    node.run("nft", "flush", "ruleset")
    assert question(town.client, VIP6, 22).startswith("sshd")
    # Nothing new is asked for, and yet it has to be made again.
    assert node.call(guard.sync, frozenset(VIPS), ports | {key(VIP, 22)}) is None
    assert question(town.client, VIP6, 22) == REFUSED
    assert node.call(guard.sync, frozenset(VIPS), ports) is None
    assert question(town.client, VIP, 22) == REFUSED
    # Somebody emptied a set: the next change finds out and makes all anew.
    node.run("nft", "flush", "set", "inet", "proxyd", "ports4")
    assert node.call(guard.sync, frozenset(VIPS), ports - {key(VIP, 80)}) is None
    assert question(town.client, VIP, 80) == REFUSED
    assert question(town.client, VIP, 80, "UDP").startswith("service")
    assert node.call(guard.sync, frozenset({VIP6, "127.96.0.1"}), frozenset()) is None
    assert question(town.client, VIP, 22).startswith("sshd"), "no longer a VIP"
    assert node.call(guard.remove) is None
    assert not node.call(guard.present)
    assert node.run("nft", "list", "ruleset") == ""


# Steering


def steer(town: Lab, naming: Naming) -> Steering:
    """The far host answers at 81 and 8080 of the external addresses; the node takes 80 and refuses 81."""
    for ip in EXTERNALS:
        for port in (81, 8080):
            naming.add(daemon_socket(town.far, ip, port, DGRAM), "far")
        naming.add(daemon_socket(town.far, ip, 81), "far")
        naming.add(daemon_socket(town.far, ip, 8081), "far")
        assert question(town.client, ip, 81).startswith("far")
        for protocol in BOTH:
            naming.add(opened(town.node, spec(ip, 80, protocol, steered=True)), "service")
    steering = Steering()
    wanted = {key(ip, 80, protocol): Action.LOCAL for ip in EXTERNALS for protocol in BOTH}
    wanted |= {key(ip, 81, protocol): Action.UNREACHABLE for ip in EXTERNALS for protocol in BOTH}
    assert town.node.call(steering.sync, wanted) == {}
    assert steering.trouble == ""
    assert town.node.call(Steering().present) == wanted
    return steering


@pytest.mark.parametrize("strict", [False, True], ids=["rp_filter=0", "rp_filter=1"])
def test_single_ports_of_a_foreign_address_are_taken(town: Lab, naming: Naming, strict: bool) -> None:
    for device in ("all", "default", "out0", "cbr0", "far0"):
        (town.node.call(_write, f"/proc/sys/net/ipv4/conf/{device}/rp_filter", str(int(strict))))
    before = routes_and_rules(town.node)
    steering = steer(town, naming)
    for host in (town.node, town.client, town.outside):
        for ip in EXTERNALS:
            for protocol in BOTH:
                assert question(host, ip, 80, protocol).startswith("service"), (host.name, ip, protocol)
                # The kernel has no ICMP error from a foreign IPv4 address for a client of its own.
                own = host is town.node and protocol == "UDP" and ip == EXTERNAL_IP
                refusal = FORBIDDEN if own else REFUSED
                assert question(host, ip, 81, protocol) == refusal, (host.name, ip, protocol)
            assert question(host, ip, 8080, "UDP").startswith("far"), (host.name, ip)
            assert question(host, ip, 8081).startswith("far"), (host.name, ip)
    assert question(town.client, EXTERNAL_IP, 80) == f"service {CLIENT_POD_IP}"
    assert question(town.outside, EXTERNAL_IP, 80) == f"service {OUTSIDE_IP}"
    assert town.node.call(steering.sync, {}) == {}
    assert town.node.call(steering.present) == {}
    assert question(town.client, EXTERNAL_IP, 81).startswith("far")
    assert routes_and_rules(town.node) == before


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123 - a sysctl
        file.write(text)


def test_steering_works_where_the_node_does_not_forward(town: Lab, naming: Naming) -> None:
    town.node.sysctl(net__ipv4__ip_forward="0", net__ipv6__conf__all__forwarding="0")
    steering = Steering()
    for ip in EXTERNALS:
        naming.add(opened(town.node, spec(ip, 80, steered=True)), "service")
    wanted = {key(ip, 80): Action.LOCAL for ip in EXTERNALS} | {
        key(ip, 81): Action.UNREACHABLE for ip in EXTERNALS
    }
    assert town.node.call(steering.sync, wanted) == {}
    for ip in EXTERNALS:
        assert question(town.client, ip, 80).startswith("service")
        assert question(town.client, ip, 81) == REFUSED


def test_steering_turns_over_and_back(town: Lab, naming: Naming) -> None:
    steering = steer(town, naming)
    wanted = town.node.call(steering.present)
    for action, answer in ((Action.UNREACHABLE, REFUSED), (Action.LOCAL, f"service {CLIENT_POD_IP}")):
        wanted[key(EXTERNAL_IP, 80)] = action
        assert town.node.call(steering.sync, wanted) == {}
        assert town.node.call(steering.present) == wanted
        assert question(town.client, EXTERNAL_IP, 80) == answer


def test_new_clients_are_refused_while_relays_live_on(town: Lab, naming: Naming) -> None:
    steering = Steering()
    with opened(town.node, spec(EXTERNAL_IP, 80, steered=True)) as listener, town.client.socket() as client:
        wanted = {key(EXTERNAL_IP, 80): Action.LOCAL}
        assert town.node.call(steering.sync, wanted) == {}
        client.settimeout(DEADLINE)
        client.connect((EXTERNAL_IP, 80))
        accepted, _ = listener.accept()
        listener.close()
        with accepted:
            assert question(town.client, EXTERNAL_IP, 80) == SILENCE
            assert town.node.call(steering.sync, wanted, frozenset(wanted)) == {}
            assert steering.trouble == ""
            for host in (town.node, town.client):
                assert question(host, EXTERNAL_IP, 80) == REFUSED
            client.sendall(b"to")
            accepted.settimeout(DEADLINE)
            assert accepted.recv(10) == b"to"
            accepted.sendall(b"fro")
            assert client.recv(10) == b"fro"
    assert town.node.call(steering.sync, {}) == {}
    assert town.node.run("nft", "list", "ruleset") == ""


def test_a_vanished_source_address_is_replaced(town: Lab, naming: Naming) -> None:
    steering = steer(town, naming)
    assert question(town.node, EXTERNAL_IP, 80) == f"service {NODE_FAR_IP}"
    town.node.ip(f"addr del {NODE_FAR_IP}/24 dev far0")
    assert town.node.call(steering.sync, town.node.call(steering.present)) == {}
    assert question(town.node, EXTERNAL_IP, 80).startswith("service ")
    assert question(town.client, EXTERNAL_IP, 80) == f"service {CLIENT_POD_IP}"


# Cleanup


def test_leftovers_of_a_killed_process_are_found_and_removed(space: Namespace) -> None:
    space.ip("rule add pref 112 fwmark 0x2000/0x2000 lookup 7112")  # somebody else's
    before = routes_and_rules(space)
    assert not space.call(cleanup.find_leftovers)
    assert space.call(cleanup.remove_leftovers) == cleanup.Removal()
    space.run(
        sys.executable,
        "-c",
        textwrap.dedent(f"""
        import os
        from tests.support.host import key
        from proxyd.host.guard import VipGuard
        from proxyd.host.routes import VipRoutes
        from proxyd.host.steering import Steering
        from proxyd.state.spec import Steering as Action
        assert not VipRoutes().add({VIPS!r})
        local, none = key({EXTERNAL_IP!r}, 80, "UDP"), key({EXTERNAL_IP6!r}, 80, "UDP")
        assert not Steering().sync({{local: Action.LOCAL, none: Action.UNREACHABLE}})
        assert VipGuard().sync(frozenset({VIPS!r}), frozenset()) is None
        os._exit(0)
        """),
    )
    # An earlier version had a rule for each port, and refused in a table of its own.
    space.ip(f"rule add pref 112 to {EXTERNAL_IP} ipproto tcp dport 81 lookup 7112 protocol 112")
    space.run("nft", "add table inet proxyd-refusal")
    found = space.call(cleanup.find_leftovers)
    assert found == cleanup.Leftovers(vip_routes=2, rules=5, steering_routes=4, tables=5)
    left = routes_and_rules(space)
    dry = space.call(lambda: cleanup.remove_leftovers(dry_run=True))
    assert dry == cleanup.Removal(
        gone=(
            "5 policy rules for foreign addresses",
            "4 routes of foreign addresses",
            "2 VIP routes",
            "5 nft tables",
        )
    )
    assert routes_and_rules(space) == left
    assert space.call(cleanup.remove_leftovers) == dry
    assert routes_and_rules(space) == before


def test_what_kube_proxy_left_is_named(space: Namespace) -> None:
    assert space.call(kube_proxy_leftovers) == []
    space.run(
        "nft",
        "-f",
        "-",
        stdin="""
        add table ip nat
        add chain ip nat KUBE-PORTALS-HOST
        add chain ip nat KUBE-SERVICES
        add chain ip nat MINE
        add table ip6 filter
        add chain ip6 filter KUBE-FIREWALL
        add table ip kube-proxy
        add chain ip kube-proxy services
        """,
    )
    space.ip("link add name kube-ipvs0 type bridge")
    left = space.call(kube_proxy_leftovers)
    assert list(map(str, left)) == [
        "nft table ip nat: KUBE-PORTALS-HOST",
        "nft table ip nat: KUBE-SERVICES",
        "nft table ip kube-proxy: services",
        "interface kube-ipvs0: virtual servers of IPVS",
    ]
    assert [one.removed_by for one in left] == [
        "proxyd cleanup --kube-proxy",
        "kube-proxy --cleanup",
        "nft delete table ip kube-proxy",
        "ipvsadm --clear; ip link delete kube-ipvs0",
    ]


def test_errno_texts_are_not_lost(space: Namespace) -> None:
    """An error that nobody foresaw still says what the kernel said."""
    with pytest.raises(BindFailed, match=os.strerror(errno.EINVAL)):
        opened(space, spec("fe80::1", 8000))  # link-local needs an interface
