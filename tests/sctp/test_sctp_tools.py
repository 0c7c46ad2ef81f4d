"""Peers that others wrote: the programs of lksctp-tools and socat, through proxyd."""

from __future__ import annotations

import contextlib
import select
import subprocess
from collections.abc import Iterator, Sequence

import pytest

from tests.support import sctp_probe
from tests.support.netlab import Namespace
from tests.support.sctp_probe import Server
from tests.support.sctplab import CLIENT_IP, PORT, SctpLab, pod_ip
from tests.support.waiting import wait_for

SERVER_PORT = 3868


@contextlib.contextmanager
def program(namespace: Namespace, argv: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A running program; ended with the block."""
    process = namespace.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with process:
        try:
            yield process
        finally:
            process.kill()


def listening(namespace: Namespace, port: int) -> bool:
    """Whether an SCTP endpoint listens on this port (/proc/net/sctp/eps: LPORT is the sixth column)."""
    lines = namespace.run("cat", "/proc/net/sctp/eps").splitlines()[1:]
    return any(line.split()[5] == str(port) for line in lines)


def read_until(process: subprocess.Popen[bytes], text: bytes) -> bytes:
    """What a program writes, up to and with this text."""
    assert process.stdout is not None
    said = b""
    while text not in said:
        assert select.select([process.stdout], [], [], sctp_probe.TIMEOUT)[0], said
        data = process.stdout.read1(1 << 16)  # type: ignore[attr-defined]  # a BufferedReader
        assert data, said
        said += data
    return said


def test_sctp_darn_talks_to_sctp_darn(sctp: SctpLab) -> None:
    pod, client = sctp.lab.pods[0], sctp.lab.client
    # By line: into a pipe it would write only when its buffer is full.
    with program(
        pod, ["stdbuf", "-oL", "sctp_darn", "-H", pod_ip(1), "-P", str(SERVER_PORT), "-l"]
    ) as server:
        wait_for(lambda: listening(pod, SERVER_PORT), "sctp_darn listens")
        service = sctp.service((pod_ip(1), SERVER_PORT))
        remote = ["-h", service.vip, "-p", str(PORT)]
        with program(client, ["sctp_darn", "-H", CLIENT_IP, "-P", "4100", *remote, "-s"]) as sender:
            assert sender.stdin is not None
            sender.stdin.write(b"first line\n")
            sender.stdin.write(b"second line\n")
            sender.stdin.flush()
            said = read_until(server, b"second line")
        assert b"first line" in said


@pytest.mark.parametrize(("case", "streams"), [("3", "17"), ("4", "1")])
def test_sctp_test_sends_its_sequences_of_sizes(sctp: SctpLab, case: str, streams: str) -> None:
    # The server is our own probe, which sees each message; it answers with the size that it got.
    with Server(sctp.lab.pods[0], pod_ip(1)) as server:
        service = sctp.service(server)
        remote = ["-h", service.vip, "-p", str(PORT)]
        argv = [
            "sctp_test",
            "-H",
            CLIENT_IP,
            "-P",
            "4101",
            *remote,
            "-s",
            "-c",
            case,
            "-x",
            "5",
            "-M",
            streams,
        ]
        with program(sctp.lab.client, argv) as sender, server.accept() as accepted:
            said, _ = sender.communicate(timeout=sctp_probe.TIMEOUT)
            received, _ = accepted.rest()
            assert sender.returncode == 0, said
        sizes = [len(message.data) for message in received]
        expected = {
            "3": [1, 1453, 32768],
            "4": [1, 1000, 2000, 3000, 5000, 10000, 15000, 20000, 25000, 32768],
        }[case]
        assert set(sizes) == set(expected)


def test_socat_talks_to_socat(sctp: SctpLab) -> None:
    pod, client = sctp.lab.pods[0], sctp.lab.client
    with program(pod, ["socat", f"SCTP4-LISTEN:{SERVER_PORT + 1},fork", "PIPE"]):
        wait_for(lambda: listening(pod, SERVER_PORT + 1), "socat listens")
        service = sctp.service((pod_ip(1), SERVER_PORT + 1))
        with program(client, ["socat", "-", f"SCTP4-CONNECT:{service.vip}:{PORT}"]) as asking:
            assert asking.stdin is not None
            asking.stdin.write(b"there and back\n")
            asking.stdin.flush()
            assert read_until(asking, b"\n") == b"there and back\n"
