"""Network namespaces for tests: a node with pods behind a bridge, an outside host, and a far host behind the node.

    outside 203.0.113.20 ---- 203.0.113.10 node 198.51.100.1 ---- 198.51.100.2 far (also 1.2.3.4 and 80.11.12.10)
                                        |
                              bridge 10.244.0.1
                              /      |        \
                       pod-1 .11  pod-2 .12 ... client .100

Every namespace is anonymous: a thread of this process lives in it, and it is gone when that thread ends, whatever
becomes of the test. A socket stays in the namespace of the thread that made it, so one process talks from every host.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from tests.support.pod_servers import PodServers
from tests.support.waiting import DEADLINE, wait_for

T = TypeVar("T")
Socket = socket.socket  # within Namespace, `socket` is its method

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

NODE_IP = "203.0.113.10"
NODE_IP6 = "2001:db8:2::10"
NODE_FAR_IP = "198.51.100.1"
BRIDGE_IP = "10.244.0.1"
OUTSIDE_IP = "203.0.113.20"
OUTSIDE_IP6 = "2001:db8:2::20"
CLIENT_POD_IP = "10.244.0.100"
DATABASE_IP = "1.2.3.4"  # the far host's, as in the seed manifest external-database.yaml
EXTERNAL_IP = "80.11.12.10"  # the far host's, as in the seed manifest external-ip.yaml
EXTERNAL_IP6 = "2001:db8:80::10"  # the far host's, after `Lab.reach_far_by_ipv6`
POD_PORT = 9376

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces (Python has os.unshare from 3.12 on).

    Raises:
        OSError: not permitted, or CLONE_NEWUSER in a process with several threads.
    """
    if _libc.unshare(flags) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"unshare: {os.strerror(errno)}")


def become_root() -> None:
    """Give this process the rights that the lab needs: where it is not root, in a user namespace of its own.

    Raises:
        OSError: user namespaces are not permitted, or this process has several threads.
    """
    if os.geteuid() == 0:
        return
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


class Namespace:
    """One network namespace, and the thread that lives in it. Its loopback is up.

    Raises:
        OSError: making a namespace is not permitted.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"netns:{name}")
        self._fd = -1
        try:
            self._fd = self.call(self._enter)
            # Addresses are usable at once: nobody else is on these links.
            self.sysctl(net__ipv6__conf__default__accept_dad="0")
            self.run("ip", "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _enter() -> int:
        unshare(CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def path(self) -> str:
        """A path that names this namespace, for `ip link ... netns PATH` and `nsenter --net=PATH`."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a function in this namespace and return what it returns. Calls do not overlap: keep them short."""
        return self._thread.submit(function, *args, **kwargs).result()

    def run(self, *argv: str, stdin: str | None = None, timeout: float = DEADLINE) -> str:
        """Run a command in this namespace; its standard output.

        Raises:
            AssertionError: it failed; with what it wrote to standard error.
        """
        done = self.call(
            subprocess.run, argv, input=stdin, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, f"{self.name}: {' '.join(argv)}: {done.stderr.strip()}"
        return str(done.stdout)

    def ip(self, script: str) -> None:
        """Run several `ip` commands, one a line."""
        self.run("ip", "-batch", "-", stdin=script)

    def popen(self, argv: Sequence[str], **kwargs: Any) -> subprocess.Popen[bytes]:
        """Start a program in this namespace. It is killed when the namespace is closed."""
        return self.call(subprocess.Popen, ["setpriv", "--pdeathsig", "KILL", *argv], **kwargs)

    def sysctl(self, **values: str) -> None:
        """Set sysctls of this namespace; `net__ipv4__ip_forward="1"` is net/ipv4/ip_forward."""
        for key, value in values.items():
            self.call(Path("/proc/sys", *key.split("__")).write_text, value)

    def settle(self) -> None:
        """Wait until every link is up with its own IPv6 address, and the kernel answers who asks for any of its addresses.

        All that comes a moment after an address or a link is made, later on a busy machine. Before that what tests compare
        would change under them, and a first packet by IPv6 would wait a second for the neighbour that was asked too early.
        """
        wait_for(self._settled, f"the links of {self.name}")

    def _settled(self) -> bool:
        links = [line for line in self.run("ip", "-o", "link").splitlines() if ": lo: " not in line]
        if not all("LOWER_UP" in line for line in links):
            return False
        if not Path("/proc/net/if_inet6").exists():
            return True
        addresses = [(row[-1], row[0]) for row in self._net("if_inet6") if row[-1] != "lo"]
        own = {link for link, ip in addresses if ip.startswith("fe80")}
        joined = {(row[1], row[2]) for row in self._net("igmp6")}
        routed = {(row[-1], row[0]) for row in self._net("ipv6_route")}
        # An address is asked for by the group that its last three bytes name (RFC 4291, 2.7.1).
        answering = all((link, f"ff0200000000000000000001ff{ip[-6:]}") in joined for link, ip in addresses)
        return len(own) == len(links) and answering and routed.issuperset(addresses)

    def _net(self, table: str) -> list[list[str]]:
        """The rows of one of this namespace's tables."""
        return [
            line.split() for line in self.call(Path("/proc/thread-self/net", table).read_text).splitlines()
        ]

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> Socket:
        """A new socket that belongs to this namespace."""
        return self.call(socket.socket, family, kind)

    def listen(self, ip: str, port: int, backlog: int = 4096) -> Socket:
        """A listening TCP socket in this namespace; `::` takes IPv4 as well."""
        made = self.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ip == "::":
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            made.bind((ip, port))
            made.listen(backlog)
        except BaseException:
            made.close()
            raise
        return made

    def close(self) -> None:
        """Leave the namespace. The kernel removes it with the last process and socket in it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._thread.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Lab:
    """A node, `pods` pods that serve on port 9376, a client pod, an outside host and a far host.

    Pod i (from 1) has 10.244.0.(10+i) and fd00:10:244::(10+i) (decimal digits), and answers as `pod-i` (see pod_servers.py);
    the far host answers as `far` on 9376, 80 and 8080.
    """

    def __init__(self, pods: int = 3, *, ipv6: bool = False) -> None:
        self._cleanup = contextlib.ExitStack()
        self.ipv6 = ipv6
        self.pods: list[Namespace] = []
        try:
            self._build(pods)
        except BaseException:
            self.close()
            raise

    def _build(self, pods: int) -> None:
        self.node = self._namespace("node")
        self.outside = self._namespace("outside")
        self.far = self._namespace("far")
        self.client = self._namespace("client")
        self.pods = [self._namespace(f"pod-{i}") for i in range(1, pods + 1)]

        self.node.sysctl(net__ipv4__ip_forward="1")
        node = [
            f"link add name out0 type veth peer name eth0 netns {self.outside.path}",
            f"link add name far0 type veth peer name eth0 netns {self.far.path}",
            "link add name cbr0 type bridge",
            f"addr add {NODE_IP}/24 dev out0",
            f"addr add {NODE_FAR_IP}/24 dev far0",
            f"addr add {BRIDGE_IP}/24 dev cbr0",
            "link set out0 up",
            "link set far0 up",
            "link set cbr0 up",
            "route add default via 198.51.100.2",
        ]
        for number, pod in enumerate([*self.pods, self.client]):
            node += [
                f"link add name pod{number} type veth peer name eth0 netns {pod.path}",
                f"link set pod{number} master cbr0 up",
            ]
        self.node.ip("\n".join(node))
        self._host(self.outside, f"{OUTSIDE_IP}/24", NODE_IP)
        self._host(self.far, "198.51.100.2/24", NODE_FAR_IP)
        self.far.ip(f"addr add {DATABASE_IP}/32 dev lo\naddr add {EXTERNAL_IP}/32 dev lo")
        for number, pod in enumerate(self.pods, 1):
            self._host(pod, f"{pod_ip(number)}/24", BRIDGE_IP)
        self._host(self.client, f"{CLIENT_POD_IP}/24", BRIDGE_IP)
        if self.ipv6:
            self._add_ipv6()
        # Ports of closed connections come back at once, so that load tests do not run out of them.
        for namespace in (self.node, self.client, self.outside):
            namespace.sysctl(net__ipv4__ip_local_port_range="10000\t29999", net__ipv4__tcp_tw_reuse="1")

        for namespace in (self.node, self.outside, self.far, self.client, *self.pods):
            namespace.settle()
        self.servers = self._cleanup.enter_context(PodServers())
        for pod in self.pods:
            self.servers.add(pod.name, pod.listen("::", POD_PORT))
        for port in (POD_PORT, 80, 8080):
            self.servers.add("far", self.far.listen("::", port))
        self.servers.start()

    def _namespace(self, name: str) -> Namespace:
        return self._cleanup.enter_context(Namespace(name))

    @staticmethod
    def _host(namespace: Namespace, address: str, gateway: str) -> None:
        namespace.ip(f"addr add {address} dev eth0\nlink set eth0 up\nroute add default via {gateway}")

    def _add_ipv6(self) -> None:
        self.node.sysctl(net__ipv6__conf__all__forwarding="1")
        self.node.ip(f"addr add {NODE_IP6}/64 dev out0 nodad\naddr add fd00:10:244::1/64 dev cbr0 nodad")
        self.outside.ip(f"addr add {OUTSIDE_IP6}/64 dev eth0 nodad\nroute add default via {NODE_IP6}")
        for number, pod in enumerate(self.pods, 1):
            pod.ip(f"addr add {pod_ip6(number)}/64 dev eth0 nodad\nroute add default via fd00:10:244::1")
        self.client.ip("addr add fd00:10:244::100/64 dev eth0 nodad\nroute add default via fd00:10:244::1")

    def reach_far_by_ipv6(self) -> None:
        """Have the node lead to the far host at EXTERNAL_IP6 as well, which the far host has from now on."""
        self.node.ip(
            "addr add fd01::1/64 dev far0 nodad\nroute add 2001:db8:80::/64 via fd01::2\n"
            f"route add {EXTERNAL_IP}/32 via 198.51.100.2"
        )
        self.far.ip(
            f"addr add fd01::2/64 dev eth0 nodad\naddr add {EXTERNAL_IP6}/128 dev lo nodad\n"
            "route add default via fd01::1"
        )
        self.node.settle()
        self.far.settle()

    def blackhole_pod(self, number: int) -> None:
        """Make a pod drop every packet it gets: connections to it hang."""
        self.pods[number - 1].run(
            "nft",
            "add table inet dead; add chain inet dead in { type filter hook input priority 0; policy drop; }",
        )

    def close(self) -> None:
        """End the servers and leave every namespace."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pod_ip(number: int) -> str:
    """Address of pod-`number`."""
    return f"10.244.0.{10 + number}"


def pod_ip6(number: int) -> str:
    """IPv6 address of pod-`number`."""
    return f"fd00:10:244::{10 + number}"


def missing_tools() -> list[str]:
    """Commands that the lab needs and the machine has not."""
    return [tool for tool in ("ip", "nft", "prlimit", "setpriv", "unshare") if not shutil.which(tool)]


def routes_and_rules(namespace: Namespace) -> dict[str, list[str]]:
    """What a program may leave behind in a namespace: local routes, other tables' routes, policy rules, nft tables."""

    def lines(*argv: str) -> Iterator[str]:
        return (line.strip() for line in namespace.run(*argv).splitlines() if line.strip())

    return {
        "routes": sorted(
            [
                *lines("ip", "-4", "route", "show", "table", "all"),
                *lines("ip", "-6", "route", "show", "table", "all"),
            ]
        ),
        "rules": sorted([*lines("ip", "-4", "rule"), *lines("ip", "-6", "rule")]),
        "addresses": sorted(lines("ip", "-o", "addr")),
        "nft": sorted(lines("nft", "list", "tables")),
    }
