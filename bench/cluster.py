"""proxyd behind an API server with size: the first lists, single changes, a storm of changes, requests during a relist.

    python -m bench.cluster [--services 10000] [--endpoints 30000] [--rate 1000] [--seconds 10] [--rounds 3]

The real program and the test API server run in a network namespace of their own (root, or a user namespace), VIPs by
routes, one worker. Two Services more have endpoints that really answer. Figures are of this machine at this moment, and
the API server, the clients and proxyd share its processors: read them as ratios. While all is listed anew the API server
runs under SCHED_IDLE, as its work would be done elsewhere; control, client and worker compete as they would on a node.

- start: from exec to every listener Serving and every worker told; memory of the control process
- change: from sending the PATCH of a slice to the first new connection that reaches the new endpoint
- storm: changes a second to other Services; one change as above meanwhile, and the last change after it
- relist: a request through the worker over and over, in turn while nothing happens and while all objects are listed anew
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from tests.support.daemon import Proxyd
from tests.support.netlab import Namespace, become_root
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parent.parent
API_PORT = 6443
BACKENDS = ("192.0.2.1", "192.0.2.2")
BACKEND_PORT = 9000
VIP = "10.111.0.1"  # its endpoint changes
STEADY_VIP = "10.111.0.2"  # its endpoint does not
SLICES = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"

_BACKEND = """
import asyncio, sys
class Name(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        self.transport.write(self.name)
        self.transport.close()
async def main():
    loop = asyncio.get_running_loop()
    for ip in sys.argv[2:]:
        kind = type("Named", (Name,), {"name": ip.encode()})
        await loop.create_server(kind, ip, int(sys.argv[1]), backlog=1000)
    await asyncio.Event().wait()
asyncio.run(main())
"""


class Api:
    """The API server, asked from the bench's namespace."""

    def __init__(self, place: Namespace) -> None:
        self._place = place
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        return self._place.call(self._ask, method, path, body)

    def _ask(self, method: str, path: str, body: Any) -> Any:
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", API_PORT, timeout=60)
        try:
            headers = {"Content-Type": "application/json"}
            self._connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = self._connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            self._connection = None
            raise
        assert answer.status < 300, (path, answer.status, text)
        return json.loads(text) if text else None

    def point(self, name: str, ip: str) -> None:
        """Give a Service this endpoint."""
        self.ask("PATCH", f"{SLICES}/{name}-1", {"endpoints": [{"addresses": [ip]}]})


def objects(name: str, vip: str, ip: str) -> tuple[dict[str, Any], dict[str, Any]]:
    ports = [{"name": "http", "port": 80, "protocol": "TCP"}]
    service = {"metadata": {"name": name}, "spec": {"clusterIP": vip, "clusterIPs": [vip], "ports": ports}}
    meta = {"name": f"{name}-1", "labels": {"kubernetes.io/service-name": name}}
    ports = [{"name": "http", "port": BACKEND_PORT, "protocol": "TCP"}]
    return service, {
        "metadata": meta,
        "addressType": "IPv4",
        "ports": ports,
        "endpoints": [{"addresses": [ip]}],
    }


@contextlib.contextmanager
def child(place: Namespace, *argv: str, **kwargs: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = place.popen([sys.executable, *argv], **kwargs)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def request(place_call: Any, vip: str) -> str:
    return place_call(_request, vip)


def _request(vip: str) -> str:
    with socket.socket() as sock:
        sock.settimeout(10)
        sock.connect((vip, 80))
        sock.sendall(b"?")
        return sock.recv(100).decode()


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> dict[str, float]:
    values = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(values[name].split()[0]) / 1000 for name in ("VmRSS", "RssAnon", "VmHWM")}


def status(daemon: Proxyd) -> dict[str, Any]:
    """The daemon's status; empty where it does not answer."""
    return daemon._ask("status") or {}  # noqa: SLF001 - a new process for each question would take too long


def quantiles(values: list[float]) -> str:
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return f"p50 {statistics.median(ordered):.1f} ms, p99 {p99:.1f} ms, most {ordered[-1]:.1f} ms ({len(ordered)})"


def change(place: Namespace, api: Api, ip: str, answered: list[float] | None = None) -> float:
    """Milliseconds from the PATCH to the first connection that gets to the new endpoint.

    `answered` gets those until the API server's answer.
    """
    began = time.perf_counter()
    api.point("web", ip)
    if answered is not None:
        answered.append((time.perf_counter() - began) * 1000)
    place.call(_until, ip)
    return (time.perf_counter() - began) * 1000


def _until(ip: str) -> None:
    while _request(VIP) != ip:
        time.sleep(0.002)  # the processors are needed by those who are waited for


class Requests:
    """Requests to the steady Service, one after the other, from a thread of their own."""

    def __init__(self, place: Namespace) -> None:
        self.milliseconds: dict[str, list[float]] = {"quiet": [], "relist": []}
        self.phase = ""
        self._stop = threading.Event()
        self._place = place
        self._thread = threading.Thread(target=lambda: place.call(self._run))

    def _run(self) -> None:
        while not self._stop.is_set():
            phase, began = self.phase, time.perf_counter()
            _request(STEADY_VIP)
            if phase:
                self.milliseconds[phase].append((time.perf_counter() - began) * 1000)
            time.sleep(0.001)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure(args: argparse.Namespace, place: Namespace, folder: Path) -> None:
    kubeconfig = folder / "kubeconfig"
    server = ["--services", str(args.services), "--endpoints", str(args.endpoints), "--port", str(API_PORT)]
    with contextlib.ExitStack() as stack:
        place.ip("\n".join(f"addr add {ip}/32 dev lo" for ip in BACKENDS))
        stack.enter_context(child(place, "-c", _BACKEND, str(BACKEND_PORT), *BACKENDS))
        process = stack.enter_context(
            child(
                place,
                "-m",
                "tests.support.api_server",
                *server,
                "--kubeconfig",
                str(kubeconfig),
                stdout=subprocess.PIPE,
                cwd=ROOT,
            )
        )
        assert process.stdout is not None
        process.stdout.readline()
        api = Api(place)
        for name, vip in (("web", VIP), ("steady", STEADY_VIP)):
            service, slices = objects(name, vip, BACKENDS[0])
            api.ask("POST", "/api/v1/namespaces/default/services", service)
            api.ask("POST", SLICES, slices)
        flags = ("--kubeconfig", str(kubeconfig), "--hostname-override", "node", *args.flags)
        daemon = Proxyd(place, folder, flags=flags)
        stack.callback(daemon.__exit__)
        start(args, daemon)
        changes(place, api)
        storm(args, place, api, daemon, process.pid)
        # In a cluster it has processors of its own: here it gets what nobody else wants.
        os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
        relist(args, place, api, daemon)


def start(args: argparse.Namespace, daemon: Proxyd) -> None:
    began = time.perf_counter()
    daemon.start(wait=False)

    def served() -> bool:
        now = status(daemon)
        return now.get("listeners", {}).get("Serving", 0) == args.services + 2 and all(
            worker["generation"] == now["generation"] for worker in now["workers"]
        )

    wait_for(served, "every listener", 120, pause=0.05)
    seconds = time.perf_counter() - began
    used = memory(daemon.pid)
    print(
        f"start: {args.services} services, {args.endpoints} endpoints served after {seconds:.2f} s;"
        f" CPU of control {cpu(daemon.pid):.2f} s;"
        f" MB of control: resident {used['VmRSS']:.0f}, anonymous {used['RssAnon']:.0f}, at most {used['VmHWM']:.0f}"
    )


def changes(place: Namespace, api: Api) -> None:
    found, answered, asked = [], [], []
    for number in range(200):
        time.sleep(0.02)
        began = time.perf_counter()
        request(place.call, STEADY_VIP)
        asked.append((time.perf_counter() - began) * 1000)
        found.append(change(place, api, BACKENDS[1 - number % 2], answered))
    print(
        f"change: {quantiles(found)}\n  of which the API server's answer: {quantiles(answered)}\n"
        f"  for comparison, one request through the worker: {quantiles(asked)}"
    )


def storm(args: argparse.Namespace, place: Namespace, api: Api, daemon: Proxyd, server: int) -> None:
    ended = threading.Event()
    before = programming(place)
    other = Api(extra := Namespace.__new__(Namespace))
    extra.call = _same_namespace(place)  # type: ignore[method-assign]  # a thread of its own in the same namespace
    order = {"rate": args.rate, "seconds": args.seconds, "services": args.services}
    spent: list[float] = []

    def run() -> None:
        began = time.perf_counter()
        other.ask("POST", "/_test/storm", order)
        spent.append(time.perf_counter() - began)
        ended.set()

    used, used_there, began = cpu(daemon.pid), cpu(server), time.perf_counter()
    thread = threading.Thread(target=run)
    thread.start()
    found, number = [], 0
    while not ended.is_set():
        found.append(change(place, api, BACKENDS[1 - number % 2]))
        number += 1
        time.sleep(0.05)
    thread.join()
    behind = change(place, api, BACKENDS[1 - number % 2])
    after = programming(place)
    count, seconds, quick = (now - then for now, then in zip(after, before, strict=True))
    whole = time.perf_counter() - began
    share, share_there = (cpu(daemon.pid) - used) / whole, (cpu(server) - used_there) / whole
    total = args.rate * args.seconds
    print(
        f"storm: {total} changes in {spent[0]:.1f} s ({total / spent[0]:.0f}/s); a change meanwhile: {quantiles(found)};"
        f" in the last second {statistics.median(found[-10:]):.1f} ms; one after it {behind:.1f} ms;"
        f" control took {share * 100:.0f} % of a processor, the API server {share_there * 100:.0f} %\n"
        f"  {count:.0f} changes took {seconds / max(count, 1) * 1000:.0f} ms each until the worker had them,"
        f" {quick / max(count, 1) * 100:.1f} % within 250 ms"
    )


def programming(place: Namespace) -> tuple[float, float, float]:
    """Changes of endpoints that the worker has, the seconds that took, and how many took 0.25 s at most."""

    def get() -> str:
        connection = http.client.HTTPConnection("127.0.0.1", 10249, timeout=60)
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    name = "kubeproxy_network_programming_duration_seconds"
    found = dict(line.rsplit(" ", 1) for line in place.call(get).splitlines() if line.startswith(name))
    return (
        float(found[f"{name}_count"]),
        float(found[f"{name}_sum"]),
        float(found[f'{name}_bucket{{le="0.25"}}']),
    )


def _same_namespace(place: Namespace) -> Any:
    descriptor = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
    entered = threading.local()

    def call(function: Any, *args: Any) -> Any:
        if not hasattr(entered, "done"):
            enter(descriptor)
            entered.done = True
        return function(*args)

    return call


def enter(descriptor: int) -> None:
    """Move the calling thread into a network namespace."""
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def relist(args: argparse.Namespace, place: Namespace, api: Api, daemon: Proxyd) -> None:
    other = Namespace.__new__(Namespace)
    other.call = _same_namespace(place)  # type: ignore[method-assign]  # as above
    generation = status(daemon)["generation"]
    took = []
    with Requests(other) as requests:
        for _ in range(args.rounds):
            time.sleep(0.5)
            requests.phase = "quiet"
            time.sleep(3)
            requests.phase = ""
            began, used = time.perf_counter(), cpu(daemon.pid)
            requests.phase = "relist"
            for operation in ("compact", "restart"):
                api.ask("POST", f"/_test/{operation}", {})
            time.sleep(0.2)
            wait_for(lambda: _watches(api) == 3, "a relist", 60, pause=0.05)
            requests.phase = ""
            took.append((time.perf_counter() - began, cpu(daemon.pid) - used))
    quiet, busy = (requests.milliseconds[phase] for phase in ("quiet", "relist"))
    ratio = sorted(busy)[int(len(busy) * 0.99)] / sorted(quiet)[int(len(quiet) * 0.99)]
    after = status(daemon)["generation"]
    used_memory = memory(daemon.pid)
    print(
        f"relist: {statistics.median(t for t, _ in took):.2f} s, CPU of control {statistics.median(c for _, c in took):.2f} s;"
        f" generations told {after - generation}; MB resident {used_memory['VmRSS']:.0f}, at most {used_memory['VmHWM']:.0f}\n"
        f"  a request, quiet:  {quantiles(quiet)}\n  a request, relist: {quantiles(busy)}; p99 {ratio:.2f} times as long"
    )


def _watches(api: Api) -> int:
    """How many watches are open: proxyd opens each when it has the list before it."""
    try:
        return int(api.ask("POST", "/_test/cut", {"plural": "none"})["watches"])
    except (OSError, http.client.HTTPException):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--services", type=int, default=10000)
    parser.add_argument("--endpoints", type=int, default=30000)
    parser.add_argument("--rate", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="quiet times and relists, in turn")
    parser.add_argument("--flags", nargs="*", default=(), help="more flags of proxyd")
    args = parser.parse_args()
    become_root()
    folder = Path(tempfile.mkdtemp(prefix="proxyd-"))
    try:
        with Namespace("bench") as place:
            measure(args, place, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
