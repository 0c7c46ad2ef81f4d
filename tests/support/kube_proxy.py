"""proxyd called by the name kube-proxy, as clusters call it, and what a real kube-proxy leaves on a node."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.support.clients import connect
from tests.support.daemon import command_line, is_alive
from tests.support.netlab import Namespace
from tests.support.paths import REPOSITORY
from tests.support.waiting import DEADLINE, wait_for

# As pip writes it for the console script.
_PROGRAM = f"#!{sys.executable}\nimport sys\nfrom proxyd.cli.entry import main\nsys.exit(main())\n"

# Answers as the health and metrics servers of a kube-proxy 1.19 in userspace mode.
_OTHER = """\
import http.server, sys, threading
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        metrics = self.server.server_port == int(sys.argv[1])
        answers = {"/proxyMode": b"userspace"} if metrics else {"/healthz": b'{"lastUpdated": "a", "currentTime": "b"}'}
        body = answers.get(self.path)
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write(body or b"")
    def log_message(self, *_): pass
servers = [http.server.ThreadingHTTPServer(("0.0.0.0", int(port)), Answers) for port in sys.argv[1:]]
for server in servers[1:]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
print("ready", flush=True)
servers[0].serve_forever()
"""


def get(node: Namespace, port: int, path: str) -> tuple[int, str] | None:
    """Status and body of a GET from the node's loopback address; None where nobody answers."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        client.sock = connect(node, "127.0.0.1", port)
        client.request("GET", path)
        response = client.getresponse()
        return response.status, response.read().decode()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        client.close()


class KubeProxy:
    """The program `kube-proxy` on a node. Leaving the `with` block kills it.

    Args:
        node: where it runs.
        folder: for its program and log.
        argv: its flags.
        prefix: a command that executes it.
    """

    def __init__(self, node: Namespace, folder: Path, *argv: str, prefix: tuple[str, ...] = ()) -> None:
        self.node = node
        self.program = folder / "kube-proxy"
        self.program.write_text(_PROGRAM)
        self.program.chmod(0o755)
        self.log_file = folder / "kube-proxy.log"
        self._argv = [*prefix, str(self.program), *argv]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return self.log_file.read_text()

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [pid for pid in map(int, children) if b"proxyd.relay.worker" in command_line(pid)]

    def start(self) -> Self:
        with self.log_file.open("ab") as log:
            self._process = self.node.popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            )
        return self

    def ask(self, port: int, path: str) -> tuple[int, str] | None:
        """As `get`, of a process that runs."""
        assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log()}"
        return get(self.node, port, path)

    def wait_healthy(self, port: int = 10256) -> None:
        wait_for(lambda: (self.ask(port, "/healthz") or (0,))[0] == 200, "health")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        print(f"log of kube-proxy:\n{self.log()[-6000:]}")
        if self.process.poll() is None:
            workers = self.workers()
            self.process.kill()
            self.process.wait()
            for pid in workers:
                if is_alive(pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def run_once(node: Namespace, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run kube-proxy to its end."""
    with KubeProxy(node, folder, *argv) as daemon:
        code = daemon.process.wait(60)
    return subprocess.CompletedProcess(argv, code, daemon.log(), "")


class OtherKubeProxy:
    """Another kube-proxy, that runs: a process of that name that answers on the ports of metrics and health."""

    def __init__(self, node: Namespace, folder: Path, metrics: int, health: int) -> None:
        program = folder / "other" / "kube-proxy"
        program.parent.mkdir()
        # A process is called after the file that was executed.
        shutil.copy(os.path.realpath(sys.executable), program)
        home = f"{sys.base_prefix}"
        self._process = node.popen(
            [str(program), "-S", "-c", _OTHER, str(metrics), str(health)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHOME": home},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        return self

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def __exit__(self, *_: object) -> None:
        self.end()
        assert self._process.stdout is not None
        self._process.stdout.close()


def userspace_rules(iptables: str, vip: str, node_ip: str, port: int = 43210) -> str:
    """Commands that make the rules of kube-proxy 1.19's userspace mode for one Service with the NodePort 30080.

    Args:
        iptables: the program.
        vip: clusterIP, port 80.
        node_ip: where the mode's own port is.
        port: the mode's own port, at which nobody listens any more.
    """
    service = '-m comment --comment "default/web:http"'
    bits = "32" if "." in vip else "128"
    return textwrap.dedent(f"""
        set -e
        nat="{iptables} -w -t nat" filter="{iptables} -w -t filter"
        for chain in KUBE-PORTALS-CONTAINER KUBE-PORTALS-HOST KUBE-NODEPORT-CONTAINER KUBE-NODEPORT-HOST; do
            $nat -N $chain
        done
        $filter -N KUBE-NODEPORT-NON-LOCAL
        $nat -A PREROUTING -m comment --comment "handle ClusterIPs; NOTE: this must be before the NodePort rules" \\
            -j KUBE-PORTALS-CONTAINER
        $nat -A OUTPUT -m comment --comment "handle ClusterIPs; NOTE: this must be before the NodePort rules" \\
            -j KUBE-PORTALS-HOST
        $nat -A PREROUTING -m addrtype --dst-type LOCAL \\
            -m comment --comment "handle service NodePorts; NOTE: this must be the last rule in the chain" \\
            -j KUBE-NODEPORT-CONTAINER
        $nat -A OUTPUT -m addrtype --dst-type LOCAL \\
            -m comment --comment "handle service NodePorts; NOTE: this must be the last rule in the chain" \\
            -j KUBE-NODEPORT-HOST
        $filter -A INPUT -m comment --comment "Ensure that non-local NodePort traffic can flow" -j KUBE-NODEPORT-NON-LOCAL
        $nat -A KUBE-PORTALS-CONTAINER -d {vip}/{bits} -p tcp {service} -m tcp --dport 80 -j REDIRECT --to-ports {port}
        $nat -A KUBE-PORTALS-HOST -d {vip}/{bits} -p tcp {service} -m tcp --dport 80 \\
            -j DNAT --to-destination {f"[{node_ip}]" if ":" in node_ip else node_ip}:{port}
        $nat -A KUBE-NODEPORT-CONTAINER -p tcp {service} -m tcp --dport 30080 -j REDIRECT --to-ports {port}
        $nat -A KUBE-NODEPORT-HOST -p tcp {service} -m tcp --dport 30080 -j REDIRECT --to-ports {port}
        $filter -A KUBE-NODEPORT-NON-LOCAL -p tcp {service} -m tcp --dport 30080 -j ACCEPT
    """)
