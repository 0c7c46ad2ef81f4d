"""What every measurement uses: the network, the pods, proxies to start, loads to run, and how long."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from bench import datagrams
from bench import load as http_load
from bench.net import HTTP_PORT, IPERF_PORT, PODS, UDP_PORT, Lab, become_root, pod_ip
from bench.peers import Proxy, Service
from bench.pods import Pods, ask, ask_udp, hard_limit
from bench.processes import BenchError, Cpu, CpuMeter, Program
from tests.support.waiting import NotInTime, wait_for

_NUMBERS = range(1, PODS + 1)
HTTP_TARGETS = tuple((pod_ip(number), HTTP_PORT) for number in _NUMBERS)
UDP_TARGETS = tuple((pod_ip(number), UDP_PORT) for number in _NUMBERS)
WEB = Service("web", 10, 80, HTTP_TARGETS)
BULK = Service(
    "bulk", 11, IPERF_PORT, ((pod_ip(1), IPERF_PORT),)
)  # a test's connections must reach one server
LIVE = Service("live", 12, 53, UDP_TARGETS, protocol="udp")
FRESH = Service("fresh", 13, 53, UDP_TARGETS, protocol="udp", one_shot=True)
# What wrk says at its end. Bytes show that every answer had its length.
_WRK_REPORT = """
done = function(summary, latency, requests)
  local e = summary.errors
  print(string.format('{"requests":%d,"bytes":%d,"errors":%d}', summary.requests, summary.bytes,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long and how much; the defaults are those of the published figures."""

    seconds: float = 1.5  # of one measured stretch under load
    warm: float = 0.7  # of the same load before it
    latency_seconds: float = 2.5
    idle: int = 5000
    sizes: tuple[int, ...] = (1000, 10000)
    changes: int = 5


QUICK = Effort(seconds=1.0, warm=0.4)
TINY = Effort(seconds=0.3, warm=0.1, latency_seconds=0.3, idle=50, sizes=(20,), changes=1)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What a proxy did in a stretch of time under load."""

    cpu: Cpu
    operations: int
    seconds: float

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds

    @property
    def micros(self) -> float:
        """Microseconds of CPU for each operation."""
        return self.cpu.total / self.operations * 1e6

    @property
    def busy(self) -> float:
        """Percent of one CPU that the proxy used."""
        return self.cpu.total / self.seconds * 100


class Bench:
    """The place where measurements are made; everything in it is gone when it is closed.

    Args:
        effort: how long and how much.
        pin: one CPU for the proxy and the others for load and pods, where a measurement is of one worker.
    """

    def __init__(self, effort: Effort, *, pin: bool = True) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        self.effort = effort
        self.pin = pin and len(cpus) > 1
        self._proxy_cpus = cpus[-1:] if self.pin else None
        self._load_cpus = cpus[:-1] if self.pin else None
        self.files = hard_limit()
        self._numbers = itertools.count(1)
        self._cleanup = contextlib.ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="proxyd-bench-"))
        self._cleanup.callback(shutil.rmtree, self.folder, ignore_errors=True)
        try:
            (self.folder / "report.lua").write_text(_WRK_REPORT)
            try:
                become_root()
                self.lab = self._cleanup.enter_context(Lab())
            except (OSError, AssertionError) as error:  # the latter is a command `ip` that failed
                where = "run as root, or where user namespaces are allowed"
                raise BenchError(f"network namespaces are needed: {where} ({error})") from None
            self.pods = self._cleanup.enter_context(Pods(self.lab, self.folder, self._load_cpus, self.files))
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def unpinned(self) -> Iterator[None]:
        """Proxies and loads that are started meanwhile, and the pods, may use every CPU."""
        everywhere = os.sched_getaffinity(0)
        before = self._proxy_cpus, self._load_cpus
        self._proxy_cpus = self._load_cpus = None
        pods = self.pods.pids()
        allowed = {pid: os.sched_getaffinity(pid) for pid in pods}
        try:
            for pid in pods:
                os.sched_setaffinity(pid, everywhere)
            yield
        finally:
            for pid in pods:
                os.sched_setaffinity(pid, allowed[pid])
            self._proxy_cpus, self._load_cpus = before

    # Proxies

    def proxy(self, kind: type[Proxy], *services: Service, workers: int = 1) -> Proxy:
        """A proxy for these services that is not started yet."""
        folder = self.folder / f"{kind.name}-{next(self._numbers)}"
        folder.mkdir()
        return kind(self.lab, folder, services, workers=workers, cpus=self._proxy_cpus, files=self.files)

    @contextlib.contextmanager
    def serving(self, kind: type[Proxy], *services: Service, workers: int = 1) -> Iterator[Proxy]:
        """A proxy that serves: right answers came through its HTTP and UDP services."""
        proxy = self.proxy(kind, *services, workers=workers)
        try:
            with proxy:
                try:
                    for service in services:
                        self.wait_serving(proxy, service)
                    self._settle(proxy)
                    yield proxy
                    proxy.check_alive()
                except (BenchError, NotInTime) as error:
                    words = proxy.last_words()
                    raise BenchError(f"{error} [its log: {words}]" if words else str(error)) from None
        finally:
            shutil.rmtree(proxy.folder, ignore_errors=True)

    def wait_serving(self, proxy: Proxy, service: Service) -> None:
        """Wait until a service answers. iperf3 is not asked: it takes a connection for a test."""
        address = proxy.address(service.name)

        def answers() -> bool:
            proxy.check_alive()
            if service.protocol == "udp":
                return ask_udp(self.lab.client, address)
            return ask(self.lab.client, address) > 0

        if service.name != BULK.name:
            wait_for(answers, f"{proxy.name} serves {service.name}", 60)

    @staticmethod
    def _settle(proxy: Proxy) -> None:
        """Wait until a proxy has done what it does after its start: less than 5 % of a CPU, for at most ten seconds."""
        meter = CpuMeter(proxy.pid)
        for _ in range(50):
            time.sleep(0.2)
            if meter.lap().total < 0.01:
                return

    # Loads

    def client(self, *argv: str) -> Program:
        """A program in the client's namespace that talks over pipes."""
        return Program(self.lab.client, argv, cpus=self._load_cpus, folder=self.folder)

    def wrk(self, proxy: Proxy, connections: int, *, close: bool) -> Stretch:
        """As many requests as go, each on its own connection or on kept ones.

        Raises:
            BenchError: an answer was missing or wrong.
        """
        url = "http://{}:{}/".format(*proxy.address(WEB.name))
        command = [
            "wrk",
            "-t1",
            f"-c{connections}",
            "-d600s",
            "--timeout",
            "20s",
            "-s",
            str(self.folder / "report.lua"),
        ]
        if close:
            command += ["-H", "Connection: close"]
        with self.client(*command, url) as wrk:
            before = self.pods.requests()
            # Every connection is made before anything is counted.
            wait_for(
                lambda: self.pods.requests() - before >= connections,
                f"{proxy.name}: answers to wrk",
                30,
                0.05,
            )
            time.sleep(self.effort.warm)
            meter = CpuMeter(proxy.pid)
            first, begin = self.pods.requests(), time.monotonic()
            time.sleep(self.effort.seconds)
            wait_for(lambda: self.pods.requests() > first, f"{proxy.name}: answers to wrk go on", 30, 0.05)
            cpu, last, end = meter.lap(), self.pods.requests(), time.monotonic()
            wrk.process.send_signal(signal.SIGINT)
            told = json.loads(wrk.finish(20, "wrk").strip().splitlines()[-1])
        proxy.check_alive()
        length = self._answer_length(proxy, close=close)
        wanted = told["requests"] * length
        if told["errors"] or not wanted <= told["bytes"] <= wanted + connections * length:
            raise BenchError(f"{proxy.name}: wrong answers: wrk says {told}, each answer has {length} bytes")
        return Stretch(cpu, last - first, end - begin)

    def _answer_length(self, proxy: Proxy, *, close: bool) -> int:
        """Bytes of one right answer, head included."""
        request = http_load.CLOSE if close else http_load.KEPT
        answer = b""
        try:
            with self.lab.client.socket() as sock:
                sock.settimeout(5)
                sock.connect(proxy.address(WEB.name))
                sock.sendall(request)
                while not http_load.is_right(answer):
                    part = sock.recv(65536)
                    if not part:
                        raise BenchError(f"{proxy.name}: a wrong answer: {answer[:60]!r}")
                    answer += part
        except OSError as error:
            raise BenchError(f"{proxy.name}: no answer after the load: {error}") from None
        return len(answer)

    @contextlib.contextmanager
    def iperf_server(self) -> Iterator[None]:
        """iperf3 in the first pod, for one test: a server that goes on may still be busy with the one before."""
        command = ["iperf3", "--server", "--one-off", "--forceflush", "--port", str(IPERF_PORT)]
        with Program(self.lab.pods[0], command, cpus=self._load_cpus, folder=self.folder) as server:
            while "listening" not in server.line("iperf3"):
                pass
            yield
            server.finish(20, "iperf3")

    def script(self, program: Any, *argv: str) -> Program:
        """One of the bench's own loads, prepared: `go` begins it."""
        made = self.client(sys.executable, program.__file__, *argv)
        try:
            made.line(argv[0])
        except BaseException:
            made.stop()
            raise
        return made

    @staticmethod
    def go(program: Program, timeout: float = 90) -> dict[str, Any]:
        """Let a prepared load run, or end; what it found."""
        program.say("go")
        found: dict[str, Any] = json.loads(program.finish(timeout, "the load").strip().splitlines()[-1])
        return found

    def paced(self, addresses: Sequence[tuple[str, int]], rate: float, *, kept: int = 0) -> dict[str, Any]:
        """Requests at fixed moments: percentiles, and errors by their names."""
        where = ",".join(f"{host}:{port}" for host, port in addresses)
        seconds = str(self.effort.latency_seconds)
        words = ("paced", where, "--rate", str(rate), "--seconds", seconds, "--kept", str(kept))
        with self.script(http_load, *words) as program:
            found = self.go(program)
        if found["answers"] + sum(found["errors"].values()) != int(rate * self.effort.latency_seconds):
            raise BenchError(f"the paced load lost count: {found}")
        return found

    def datagrams(
        self, proxy: Proxy, name: str, mode: str, rate: float = 0
    ) -> tuple[Stretch, dict[str, Any]]:
        """UDP queries."""
        host, port = proxy.address(name)
        words = (mode, f"{host}:{port}", "--rate", str(rate), "--seconds", str(self.effort.seconds))
        with self.script(datagrams, *words) as program:
            meter = CpuMeter(proxy.pid)
            found = self.go(program)
            cpu = meter.lap()
        if found["wrong"] or not found["answered"]:
            raise BenchError(f"{proxy.name}: wrong answers to datagrams: {found}")
        return Stretch(cpu, found["answered"], found["seconds"]), found

    def close(self) -> None:
        """End and remove everything."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
