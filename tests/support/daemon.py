"""The real program: `proxyd run` in a namespace, asked and stopped as an operator would."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.support.netlab import Namespace
from tests.support.paths import REPOSITORY
from tests.support.waiting import DEADLINE, wait_for

# Another build of the program can be tested by naming its command here.
COMMAND = shlex.split(os.environ.get("PROXYD_TEST_COMMAND", "")) or [sys.executable, "-m", "proxyd"]
UNPRIVILEGED = ["unshare", "--user", "--map-user=1000"]
# The usual soft limit of a login: the program must raise it to the hard one itself.
FEW_DESCRIPTORS = ["prlimit", "--nofile=1024:"]


@dataclass(frozen=True)
class Listener:
    """One line of `proxyd get listeners`."""

    ip: str
    port: int
    state: str
    detail: str
    service: str
    protocol: str = "TCP"

    @classmethod
    def read(cls, entry: dict[str, Any]) -> Self:
        """From one object of `-o json`."""
        return cls(
            ip=entry["address"],
            port=entry["port"],
            state=entry["state"],
            detail=entry["detail"],
            service=f"{entry['namespace']}/{entry['name']}",
            protocol=entry["protocol"],
        )


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("proxyd", timeout=DEADLINE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Proxyd:
    """A running `proxyd run`. Leaving the `with` block kills what is left of it.

    Args:
        namespace: where it runs.
        folder: for its socket, state file and logs; a short path, as a Unix socket's has at most 107 bytes.
        manifests: files and folders to serve.
        flags: more of the command line.
        workers: `--workers`.
        unprivileged: run it as a user other than root that has no capabilities.
        path: more folders that it may import from.
        before: a command that executes it.
    """

    def __init__(
        self,
        namespace: Namespace,
        folder: Path,
        *manifests: Path,
        flags: tuple[str, ...] = (),
        workers: int = 1,
        unprivileged: bool = False,
        path: tuple[Path, ...] = (),
        before: tuple[str, ...] = (),
    ) -> None:
        self.namespace = namespace
        self.folder = folder
        self.socket = folder / "admin.sock"
        self.log_file = folder / "log.jsonl"
        self._path = os.pathsep.join(map(str, (REPOSITORY, *path)))
        self._prefix = [*before, *(UNPRIVILEGED if unprivileged else [])]
        self._process: subprocess.Popen[bytes] | None = None
        self._argv = [
            *("run", "--log-format", "json"),
            *("--admin-socket", str(self.socket)),
            *("--state-file", str(folder / "state.json")),
            *("--workers", str(workers)),
            *(word for path in manifests for word in ("--manifests", str(path))),
            *flags,
        ]

    # Life

    def start(self, *, wait: bool = True) -> Self:
        """Start it, and wait until it answers and its workers are ready."""
        with self.log_file.open("ab") as log:
            self._process = self.namespace.popen(
                [*FEW_DESCRIPTORS, *self._prefix, *COMMAND, *self._argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": self._path},
                cwd=self.folder,
            )
        if wait:
            self.wait_answers()
        return self

    def wait_answers(self) -> None:
        """Wait until it answers on its admin socket."""

        def answered() -> bool:
            assert self.process.poll() is None, f"proxyd ended with {self.process.returncode}:\n{self.log()}"
            status = self._ask("status")
            return (
                status is not None
                and status["phase"] == "serving"
                and all(each["state"] == "ready" for each in status["workers"])
            )

        wait_for(answered, "an answer on the admin socket, and ready workers")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The control process."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def pid(self) -> int:
        """Pid of the control process (setpriv, prlimit and unshare execute it in place)."""
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the control process."""
        self.process.send_signal(number)

    def wait(self, timeout: float = DEADLINE) -> int:
        """Wait for its end; its exit code, negative for a signal."""
        return self.process.wait(timeout)

    def stop(self, timeout: float = DEADLINE) -> int:
        """SIGTERM, and its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def children(self) -> list[int]:
        """Pids of all processes that the control process has started and not waited for, lowest first."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return sorted(int(pid) for pid in children)

    def worker_pids(self) -> list[int]:
        """Pids of the workers that run, lowest first; control has other children now and then, such as `nft`."""
        return [pid for pid in self.children() if b"proxyd.relay.worker" in command_line(pid)]

    def log(self) -> str:
        """Everything that it wrote."""
        return self.log_file.read_text()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        print(f"log of proxyd {self.pid}:\n{self.log()[-6000:]}")
        if self._process.poll() is None:
            children = self.children()
            self._process.kill()
            self._process.wait()
            # Workers end with control; a test that shows they do not must not leave them either.
            for pid in children:
                if is_alive(pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    # Questions

    def cli(self, *words: str, timeout: float = DEADLINE) -> subprocess.CompletedProcess[str]:
        """Run another command of the program against this daemon."""
        return subprocess.run(
            [*COMMAND, *words, "--admin-socket", str(self.socket)],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )

    def _ask(self, what: str) -> dict[str, Any] | None:
        """An answer of the admin socket; None where nobody answers.

        Tests ask often, and a new process for each question would take most of their time.
        """
        connection = _Connection(self.socket)
        try:
            connection.request("GET", f"/v1/{what}")
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        assert response.status == http.client.OK, f"{what}: {response.status} {body!r}"
        answer: dict[str, Any] = json.loads(body)
        return answer

    def try_get(self, noun: str) -> list[dict[str, Any]] | None:
        """What `proxyd get NOUN -o json` says; None where the daemon does not answer."""
        answer = self._ask(noun)
        return None if answer is None else list(answer["items"])

    def get(self, noun: str) -> list[dict[str, Any]]:
        """What `proxyd get NOUN -o json` says."""
        items = self.try_get(noun)
        assert items is not None, f"the daemon does not answer:\n{self.log()}"
        return items

    def cli_get(self, noun: str) -> list[dict[str, Any]]:
        """`proxyd get NOUN -A -o json` itself."""
        done = self.cli("get", noun, "-A", "-o", "json")
        assert done.returncode == 0, f"proxyd get {noun}: {done.stderr}"
        items: list[dict[str, Any]] = json.loads(done.stdout)["items"]
        return items

    def status(self) -> dict[str, Any]:
        """`proxyd status -o json`."""
        done = self.cli("status", "-o", "json")
        assert done.returncode == 0, f"proxyd status: {done.stderr}"
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def listeners(self) -> list[Listener]:
        """Every listener and its status."""
        return [Listener.read(entry) for entry in self.get("listeners")]

    def find(self, ip: str, port: int, service: str = "") -> Listener | None:
        """The listener at this address (of this Service, `namespace/name`), if there is one."""
        for listener in self.listeners():
            if (listener.ip, listener.port) == (ip, port) and service in {"", listener.service}:
                return listener
        return None

    def wait_listener(self, ip: str, port: int, state: str = "Serving", service: str = "") -> Listener:
        """Wait until the listener at this address has this state, and return it."""

        def reached() -> Listener | None:
            found = self.find(ip, port, service)
            return found if found and found.state == state else None

        try:
            return wait_for(reached, f"{ip}:{port} {state}")
        except AssertionError as error:
            listing = "\n".join(str(each) for each in self.listeners())
            raise AssertionError(f"{error}\n{listing}\n{self.log()}") from None

    def wait_listeners(self, condition: Callable[[list[Listener]], bool], what: str) -> list[Listener]:
        """Wait until the list of listeners is as wanted, and return it."""

        def reached() -> tuple[list[Listener]] | None:
            found = self.listeners()
            return (found,) if condition(found) else None

        return wait_for(reached, what)[0]

    def vip(self, service: str) -> str:
        """The clusterIP that a Service (`namespace/name`) was given, once it is served."""

        def given() -> str:
            for entry in self.get("services"):
                if f"{entry['namespace']}/{entry['name']}" == service:
                    return str(next(iter(entry["clusterIps"]), ""))
            return ""

        return wait_for(given, f"a clusterIP for {service}")


def resident_kib(pid: int) -> int:
    """Resident memory of a process in KiB, without what it shares (the counters' memory)."""
    values = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(values["RssAnon"].split()[0])


def command_line(pid: int) -> bytes:
    """Of a process; nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):  # the latter where it goes between opening and reading
        return False
