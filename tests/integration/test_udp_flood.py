"""A million clients that are never heard of again: established flows go on, memory is flat, evictions are told."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon import Proxyd, resident_kib
from tests.support.dns import NODE_PORT, answers, dns_endpoints, dns_service, echo, port_figures, programs
from tests.support.manifests import write
from tests.support.netlab import NODE_IP, Lab, Namespace
from tests.support.waiting import DEADLINE, wait_for

FLOOD = 1_000_000
CHUNK = 1000
FIRST_SOURCE = 0x0A100000  # 10.16.0.0/12 has a little more than a million addresses
EVICTIONS = "as many UDP flows as there may be"

Run = Callable[..., Proxyd]


class Spoofer:
    """Sends `hush` to a UDP port, each time from another address."""

    def __init__(self, host: Namespace, ip: str, port: int) -> None:
        self._sock = host.call(socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._to = (ip, 0)
        # ip(7): the kernel fills in length, identification and checksum. A UDP checksum of 0 is none.
        header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 64, 17, 0, bytes(4), socket.inet_aton(ip))
        self._packet = bytearray(header + struct.pack("!HHHH", 4000, port, 8 + 4, 0) + b"hush")
        self._next = FIRST_SOURCE

    def send(self, count: int) -> None:
        """From so many more addresses."""
        for source in range(self._next, self._next + count):
            struct.pack_into("!I", self._packet, 12, source)
            self._sock.sendto(self._packet, self._to)
        self._next += count

    def close(self) -> None:
        self._sock.close()


@pytest.mark.timeout(600)
def test_a_million_clients(lab: Lab, manifests: Path, proxyd: Run) -> None:
    """After each thousand a conversation at the same listener asks something, and waits: none of it may be lost.

    The answer comes behind the thousand in every queue, so nothing is sent faster than it is taken.
    """
    lab.node.sysctl(net__ipv4__conf__all__rp_filter="0", net__ipv4__conf__out0__rp_filter="0")
    write(manifests / "dns.yaml", dns_service(), dns_endpoints(1))
    with programs(echo(lab.pods[0])), lab.outside.socket(kind=socket.SOCK_DGRAM) as client:
        daemon = proxyd()
        daemon.wait_listener(NODE_IP, NODE_PORT)
        wait_for(lambda: answers(lab.outside, NODE_IP, NODE_PORT), "an answer")
        client.settimeout(DEADLINE)
        client.connect((NODE_IP, NODE_PORT))
        spoofer = Spoofer(lab.outside, NODE_IP, NODE_PORT)
        (worker,) = daemon.worker_pids()
        before = 0
        try:
            for i in range(FLOOD // CHUNK):
                spoofer.send(CHUNK)
                question = b"%d" % i
                client.send(question)
                assert client.recv(100) == question
                if i == 100:  # the table is full
                    before = resident_kib(worker)
        finally:
            spoofer.close()
        assert resident_kib(worker) - before < 8 * 1024
        assert daemon.worker_pids() == [worker]

        def counted() -> bool:
            return port_figures(lab.node)["proxyd_received_datagrams_total"] >= FLOOD + FLOOD // CHUNK

        wait_for(counted, "the last datagrams to be counted")
        got = port_figures(lab.node)
        flows = got["proxyd_connections_total"]
        assert FLOOD < flows < FLOOD + 10  # the conversation's is one, and stays it
        assert got["proxyd_connections_active"] <= 32_768
        assert got["proxyd_flows_evicted_total"] > FLOOD - 2 * 32_768
        assert not {name: value for name, value in got.items() if "dropped" in name and value}
        told = [line for line in map(json.loads, daemon.log().splitlines()) if EVICTIONS in json.dumps(line)]
        assert 1 <= len(told) < 30, told
