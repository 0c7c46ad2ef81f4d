"""Messages through proxyd beside a direct association and socat: messages/s and CPU per message, as ratios.

    python -m bench.sctp [--seconds 5] [--rounds 3] [--sizes 100,1400,65536]

Where this kernel has no SCTP it runs in the virtual machine of the tests (tests/vm; `make prerequisites` prepares it):
figures of an emulated machine are ratios and nothing else. Client and server are processes of their own on loopback, and
all ways get the same load in turns: messages one way as fast as the server takes them, the size doubling as name of the
load. "CPU" is that of the whole machine for each message, with client, server and kernel; "proxy" that of the proxy
process alone. socat forwards bytes: streams, boundaries and identifiers are lost on its way, and proxyd keeps them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.daemon import Proxyd
from tests.support.manifests import service, write
from tests.support.netlab import Namespace, become_root
from tests.support.sctp_probe import NODELAY, SCTP, Association, End, Message, Server, connect
from tests.support.waiting import wait_for
from tests.vm.errors import has_sctp

REPOSITORY = Path(__file__).resolve().parent.parent
VIP, PORT, SOCAT_PORT = "127.96.0.10", 3868, 3869
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Result:
    """One run: how many messages in how many seconds, and the seconds of CPU of the machine and of the proxy."""

    messages: int
    seconds: float
    machine: float
    proxy: float


def serve(server: Server) -> None:
    """Take whatever comes, one association after the other, and answer when as much has come as the client says."""
    while True:
        with server.accept() as association:
            count, expected = 0, -1
            while isinstance(message := association.receive(), Message):
                # socat puts messages together; and streams wait for nobody: the last message may overtake others.
                last = message.data.lstrip(b"\0")
                if last:
                    expected = int(last.rstrip(b"!"))
                count += len(message.data) - len(last)
                if count == expected:
                    association.send(Message(b"all"))


def load(client: Association, size: int, seconds: float) -> int:
    """Send messages for so long, then wait until all of them have arrived; how many."""
    messages = [Message(bytes(size), stream) for stream in range(10)]
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end:
        client.send(*messages)
        count += len(messages)
    client.send(Message(b"%d!" % (count * size)))
    client.socket.settimeout(120)  # an emulated machine may take long for what is queued
    answer = client.receive()
    assert isinstance(answer, Message), answer
    return count


def cpu_of_machine() -> float:
    """Seconds that its processors were busy."""
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / _TICKS


def cpu_of(pids: Sequence[int]) -> float:
    """Seconds of CPU of processes, and of their children that have ended."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += sum(map(int, fields[11:15]))
    return total / _TICKS


def has_children(pid: int) -> bool:
    return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text().strip())


@contextlib.contextmanager
def child(server: Server) -> Iterator[None]:
    """The server, in a process of its own."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            serve(server)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class Bench:
    """Server, proxyd and socat in a namespace of their own."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.namespace = stack.enter_context(Namespace("bench"))
        server = stack.enter_context(Server(self.namespace, "127.0.0.1"))
        server.socket.settimeout(None)
        stack.enter_context(child(server))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sctp-")))
        self._write(folder / "manifests", server.port)
        flags = ("--feature-gates=SCTPSupport=true", "--vip-mode=loopback", "--allow-loopback-endpoints=true")
        proxyd = stack.enter_context(Proxyd(self.namespace, folder, folder / "manifests", flags=flags))
        proxyd.wait_listener(VIP, PORT)
        self.ports = {"direct": ("127.0.0.1", server.port), "proxyd": (VIP, PORT)}
        self.proxies: dict[str, list[int]] = {"direct": [], "proxyd": proxyd.worker_pids()}
        if shutil.which("socat"):
            to = f"SCTP4-CONNECT:127.0.0.1:{server.port},setsockopt-int={SCTP}:{NODELAY}:1"
            listen = f"SCTP4-LISTEN:{SOCAT_PORT},fork,reuseaddr,setsockopt-int={SCTP}:{NODELAY}:1"
            socat = self.namespace.popen(["socat", "-b", "131072", listen, to])
            stack.callback(socat.wait)
            stack.callback(socat.kill)
            self.ports["socat"] = ("127.0.0.1", SOCAT_PORT)
            self.proxies["socat"] = [socat.pid]
            wait_for(self._socat_listens, "socat listens")

    @staticmethod
    def _write(folder: Path, port: int) -> None:
        folder.mkdir()
        manifest = service("sig", VIP)
        manifest["spec"]["ports"] = [{"port": PORT, "protocol": "SCTP"}]
        subset = {"addresses": [{"ip": "127.0.0.1"}], "ports": [{"port": port, "protocol": "SCTP"}]}
        backends = {"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "sig"}, "subsets": [subset]}
        write(folder / "sig.yaml", manifest, backends)

    def _socat_listens(self) -> bool:
        lines = self.namespace.run("cat", "/proc/net/sctp/eps").splitlines()[1:]
        return any(line.split()[5] == str(SOCAT_PORT) for line in lines)

    def run(self, way: str, size: int, seconds: float) -> Result:
        """One run of one way."""
        pids = self.proxies[way]
        proxy, machine, start = cpu_of(pids), cpu_of_machine(), time.monotonic()
        # Small: socat takes some hundred messages a second, and has to empty what is queued in the end.
        with connect(self.namespace, *self.ports[way], buffer=max(1 << 16, 4 * size)) as client:
            count = load(client, size, seconds)
            spent = time.monotonic() - start
            machine = cpu_of_machine() - machine
            client.shut_down()
            while not isinstance(client.receive(), End):
                pass
        if way == "socat":
            wait_for(lambda: not has_children(pids[0]), "the end of socat's child")  # its CPU is counted then
        return Result(count, spent, machine, cpu_of(pids) - proxy)


def report(size: int, results: dict[str, list[Result]]) -> None:
    """Print one size's table."""

    def median(way: str, figure: str) -> float:
        values = {
            "rate": [one.messages / one.seconds for one in results[way]],
            "machine": [one.machine / one.messages * 1e6 for one in results[way]],
            "proxy": [one.proxy / one.messages * 1e6 for one in results[way]],
        }
        return statistics.median(values[figure])

    direct, cost = median("direct", "rate"), median("direct", "machine")
    for way in results:
        rate, machine, proxy = (median(way, figure) for figure in ("rate", "machine", "proxy"))
        print(
            f"{size:>8}  {way:<7} {rate:>10,.0f}  {rate / direct:>5.2f}  {machine:>10,.1f}  {machine / cost:>5.2f}"
            f"  {proxy:>10,.1f}",
            flush=True,
        )


def main() -> None:
    """Run it, in the machine where that is needed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="100,1400,65536", help="bytes of a message")
    arguments = parser.parse_args()
    if not has_sctp():
        environment = {**os.environ, "PROXYD_TEST_PATIENCE": "6"}
        command = [sys.executable, "-m", "tests.vm", "--", sys.executable, "-m", "bench.sctp", *sys.argv[1:]]
        sys.exit(subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode)
    become_root()
    print("   bytes  way      messages/s  ratio  CPU µs/msg  ratio  proxy µs/msg")
    with contextlib.ExitStack() as stack:
        bench = Bench(stack)
        for size in map(int, arguments.sizes.split(",")):
            results: dict[str, list[Result]] = {way: [] for way in bench.ports}
            for _ in range(arguments.rounds):
                for way, found in results.items():
                    found.append(bench.run(way, size, arguments.seconds))
            report(size, results)


if __name__ == "__main__":
    main()
