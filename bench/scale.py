"""How proxyd behaves with size: start, memory, one change, one edit of a folder, `get services`.

    python bench/scale.py [--listeners 1000,10000] [--changes 30] [--layout folder,file] [--json PATH]

The real program runs in a network namespace of its own (root, or a user namespace), over manifests with two ports for
each Service, VIPs by routes, and one endpoint each. Figures are of this machine at this moment: read them as ratios.

Modules are compiled before, as an installed proxyd's are.

- start: from exec to READY=1 for systemd: every listener Serving, every worker told, the admin API answers
- change: from the rename of one endpoint's file to the first new connection that reaches the new endpoint
- rewrite: the same where the file is written in place (truncated, then filled)
- re-read: how many files were read for one edit (opens of manifests, seen by inotify)
- get: `proxyd get services`, client and server
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("10.200.0.1", "10.200.0.2")
BACKEND_PORT = 9000
PORTS = (80, 443)
DEADLINE = 60.0
_MARK = "PROXYD_BENCH_NAMESPACE"

SERVICE = """\
apiVersion: v1
kind: Service
metadata:
  name: svc-{n}
  namespace: ns-{group}
  creationTimestamp: "2024-01-01T00:00:00Z"
spec:
  clusterIP: {vip}
  ports:
    - name: http
      port: 80
    - name: https
      port: 443
"""
SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: svc-{n}-abcde
  namespace: ns-{group}
  labels:
    kubernetes.io/service-name: svc-{n}
addressType: IPv4
ports:
  - name: http
    port: 9000
  - name: https
    port: 9000
endpoints:
  - addresses:
      - {endpoint}
    conditions:
      ready: true
"""


def vip(number: int) -> str:
    return f"10.96.{number // 250}.{1 + number % 250}"


def documents(number: int, endpoint: str = BACKENDS[0]) -> str:
    names = {"n": number, "group": number % 20, "vip": vip(number), "endpoint": endpoint}
    return f"---\n{SERVICE.format(**names)}---\n{SLICE.format(**names)}"


def write_over(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.rename(path)


class Manifests:
    """The manifests of `count` Services, as one file or as a folder of one file for each."""

    def __init__(self, folder: Path, layout: str, count: int) -> None:
        self.count = count
        self.layout = layout
        self.chosen = count // 2  # the Service whose endpoint changes
        self._endpoint = 0
        if layout == "file":
            self.path = folder / "all.yaml"
            self._texts = [documents(n) for n in range(count)]
            self.path.write_text("".join(self._texts))
        else:
            self.path = folder / "manifests"
            self.path.mkdir()
            for n in range(count):
                (self.path / f"svc-{n:05d}.yaml").write_text(documents(n))

    @property
    def edited(self) -> Path:
        return self.path if self.layout == "file" else self.path / f"svc-{self.chosen:05d}.yaml"

    def change(self, write: Callable[[Path, str], object]) -> tuple[str, float]:
        """Move one endpoint to the other backend; returns the backend, and when the write began."""
        self._endpoint = 1 - self._endpoint
        text = documents(self.chosen, BACKENDS[self._endpoint])
        if self.layout == "file":
            self._texts[self.chosen] = text
            text = "".join(self._texts)
        began = time.monotonic()
        write(self.edited, text)
        return BACKENDS[self._endpoint], began


def serve_backends() -> None:
    """Both backends: each says which one it is and closes."""
    for address in BACKENDS:
        listening = socket.create_server((address, BACKEND_PORT), backlog=1024)
        threading.Thread(target=_answer, args=(listening, address.encode()), daemon=True).start()


def _answer(listening: socket.socket, text: bytes) -> None:
    while True:
        connection, _ = listening.accept()
        with contextlib.suppress(OSError), connection:
            connection.sendall(text)


def ask(address: str, port: int, timeout: float = 1.0) -> str:
    """Who answers there; "" for nobody."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout) as connection:
        return connection.recv(64).decode()
    return ""


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Daemon:
    """`proxyd run` over manifests."""

    def __init__(self, folder: Path, manifests: Path) -> None:
        self.admin = folder / "admin.sock"
        self.log = folder / "log"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(folder / "notify"))
        self._notify.settimeout(DEADLINE)
        self._arguments = [
            *(sys.executable, "-m", "proxyd", "run"),
            f"--manifests={manifests}",
            f"--admin-socket={self.admin}",
            f"--state-file={folder / 'state.json'}",
            "--log-format=json",
            "--drain-timeout=0",
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator[float]:
        """Gives the time of exec (monotonic)."""
        with self.log.open("wb") as log:
            began = time.monotonic()
            environment = {**os.environ, "NOTIFY_SOCKET": self._notify.getsockname()}
            process = subprocess.Popen(self._arguments, stdout=log, stderr=log, cwd=ROOT, env=environment)
        self.pid = process.pid
        try:
            yield began
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def wait_ready(self) -> None:
        """Wait until it says that it is ready. Nothing asks it meanwhile, which would take its time."""
        try:
            while b"READY=1" not in self._notify.recv(4096).split(b"\n"):
                pass
        except TimeoutError:
            raise SystemExit(f"not ready after {DEADLINE:.0f} s:\n{self.log.read_text()[-2000:]}") from None

    def status(self) -> dict[str, Any]:
        connection = _Unix(str(self.admin))
        try:
            connection.request("GET", "/v1/status")
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def workers(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def wait_serving(self, listeners: int) -> None:
        deadline = time.monotonic() + DEADLINE
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                status = self.status()
                told = [worker["generation"] == status["generation"] for worker in status["workers"]]
                if status["listeners"].get("Serving") == listeners and told and all(told):
                    return
            if time.monotonic() > deadline:
                raise SystemExit(f"not serving after {DEADLINE:.0f} s:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.01)


def rss_mb(pid: int) -> tuple[float, float]:
    """Resident memory of a process in MB: all of it, and without what it shares with others."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Opens:
    """Counts the opens of files in a folder, through inotify."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        libc.inotify_add_watch(self._fd, os.fsencode(folder), 0x20)  # IN_OPEN

    def take(self) -> set[str]:
        names = set()
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._fd, 1 << 16):
                offset = 0
                while offset < len(data):
                    _, _, _, length = struct.unpack_from("iIII", data, offset)
                    name = data[offset + 16 : offset + 16 + length].rstrip(b"\0").decode()
                    if name and not name.startswith("."):
                        names.add(name)
                    offset += 16 + length
        return names


def changes(manifests: Manifests, count: int, write: Callable[[Path, str], object]) -> list[float]:
    """Milliseconds until each of `count` changes is in force."""
    times = []
    for _ in range(count):
        time.sleep(0.15)
        expected, began = manifests.change(write)
        while ask(vip(manifests.chosen), PORTS[0]) != expected:
            if time.monotonic() - began > DEADLINE:
                raise SystemExit("a change is not in force")
            time.sleep(0.0005)
        times.append((time.monotonic() - began) * 1000)
    return times


def spread(times: list[float]) -> str:
    ordered = sorted(times)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return f"median {statistics.median(ordered):.1f} ms, p95 {p95:.1f} ms, worst {ordered[-1]:.1f} ms"


def measure(layout: str, listeners: int, rounds: int, folder: Path) -> dict[str, Any]:
    count = listeners // len(PORTS)
    manifests = Manifests(folder, layout, count)
    daemon = Daemon(folder, manifests.path)
    found: dict[str, Any] = {"layout": layout, "listeners": listeners}

    def say(name: str, value: object, text: str) -> None:
        found[name] = value
        print(f"  {name:18} {text}", flush=True)

    print(f"{listeners} listeners, {count} Services, as a {layout}")
    with daemon.running() as began:
        while ask(vip(count - 1), PORTS[-1]) != BACKENDS[0]:
            if time.monotonic() - began > DEADLINE:
                raise SystemExit(f"not serving:\n{daemon.log.read_text()[-2000:]}")
            time.sleep(0.005)
        first = time.monotonic() - began
        daemon.wait_ready()
        whole = time.monotonic() - began
        daemon.wait_serving(listeners)
        spent = [cpu_seconds(pid) for pid in (daemon.pid, *daemon.workers())]
        say("start", whole, f"{whole:.2f} s (answer through the last listener after {first:.2f} s)")
        found["cpu"] = spent
        print(f"  {'':18} CPU: control {spent[0]:.2f} s, all workers {sum(spent[1:]):.2f} s")
        time.sleep(1.0)
        all_of_it, own = rss_mb(daemon.pid)
        say("control", all_of_it, f"{all_of_it:.0f} MB resident ({own:.0f} MB its own)")
        all_of_it, own = max(rss_mb(pid) for pid in daemon.workers())
        say("worker", all_of_it, f"{all_of_it:.0f} MB resident ({own:.0f} MB its own)")
        times = changes(manifests, rounds, write_over)
        say("change", times, spread(times))
        times = changes(manifests, max(3, rounds // 3), Path.write_text)
        say("rewrite", times, spread(times))
        if layout == "folder":
            opens = Opens(manifests.path)
            changes(manifests, 1, write_over)
            time.sleep(0.3)
            read = opens.take()
            say("re-read", len(read), f"{len(read)} file(s) for one edit")
        times = []
        for _ in range(5):
            command = [
                sys.executable,
                "-m",
                "proxyd",
                "get",
                "services",
                "-A",
                f"--admin-socket={daemon.admin}",
            ]
            asked = time.monotonic()
            done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=True)
            times.append((time.monotonic() - asked) * 1000)
            assert len(done.stdout.splitlines()) == count + 1
        say("get", times, f"{statistics.median(times):.0f} ms (median of {len(times)})")
        all_of_it, own = rss_mb(daemon.pid)
        say("control at the end", all_of_it, f"{all_of_it:.0f} MB resident ({own:.0f} MB its own)")
    return found


def compile_modules(folder: Path) -> None:
    """Have every module compiled, in a folder of the measurement's own: processes that begin now find them there."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)
    modules = "proxyd.cli.run, proxyd.cli.get, proxyd.control.daemon, proxyd.control.admin.server, proxyd.control.observe.server"
    everything = f"import proxyd.cli.entry, proxyd.cli.main, proxyd.relay.worker, {modules}"
    subprocess.run(
        [sys.executable, "-m", "proxyd", "version"], stdout=subprocess.DEVNULL, cwd=ROOT, check=True
    )
    subprocess.run([sys.executable, "-c", everything], cwd=ROOT, check=True)


def enter_namespace() -> None:
    """Go on in a network namespace of our own, whose loopback is up."""
    if os.environ.get(_MARK):
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        for address in BACKENDS:
            subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
        return
    words = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
    os.environ[_MARK] = "1"
    os.execvp(words[0], [*words, sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--listeners", default="1000,10000", help="how many, comma-separated")
    parser.add_argument("--layout", default="folder,file", help="folder, file or both")
    parser.add_argument("--changes", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    enter_namespace()
    serve_backends()
    results = []
    with tempfile.TemporaryDirectory(prefix="proxyd-scale-") as compiled:
        compile_modules(Path(compiled))
        for listeners in map(int, args.listeners.split(",")):
            for layout in args.layout.split(","):
                folder = Path(tempfile.mkdtemp(prefix="proxyd-scale-"))
                try:
                    results.append(measure(layout, listeners, args.changes, folder))
                finally:
                    shutil.rmtree(folder)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
