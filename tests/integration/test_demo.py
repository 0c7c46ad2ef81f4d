"""`proxyd demo` in a network namespace of its own, without any capability."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.netlab import Namespace
from tests.support.paths import REPOSITORY
from tests.support.waiting import DEADLINE

POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


@contextmanager
def demo(
    namespace: Namespace, folder: Path, temporary: str = ""
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A demo that serves, and what it said until then.

    Args:
        namespace: where it runs.
        folder: for its admin socket.
        temporary: for its temporary files; the system's folder where none is given.
    """
    command = [*POWERLESS, sys.executable, "-m", "proxyd", "demo", "--admin-socket", f"{folder}/admin.sock"]
    env = {**os.environ, **({"TMPDIR": temporary} if temporary else {})}
    with namespace.popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY, env=env
    ) as process:
        try:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line.decode())
                if line.startswith(b"Connections"):
                    break
            yield process, "".join(said)
        finally:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=DEADLINE)


def fetch(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=DEADLINE) as answer:
        return answer.read()


def test_the_demo_serves_and_ends_at_once(folder):
    with Namespace("demo") as namespace, demo(namespace, folder) as (process, said):
        assert "curl http://127.96.0.10:8080/" in said
        (hint,) = [line for line in said.splitlines() if " get endpoints" in line]
        # It is not on the PATH under this name: what is told can be typed as it stands.
        told = subprocess.run(
            hint.partition("  in another")[0],
            shell=True,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "127.1.0.1:9376" in told.stdout
        rows = [line.split() for line in said.splitlines() if line.startswith("default")]
        assert {(row[1], row[-1]) for row in rows} == {("web", "Serving"), ("web-sticky", "Serving")}

        answers = {namespace.call(fetch, "http://127.96.0.10:8080/") for _ in range(12)}
        assert answers == {b"hello from web-1\n", b"hello from web-2\n", b"hello from web-3\n"}
        assert len({namespace.call(fetch, "http://127.0.0.1:30080/") for _ in range(6)}) == 1

        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, err
        assert b"Traceback" not in err
        assert out.count(b"127.96.0.10:8080") == 12
    assert not list(folder.iterdir())


def test_a_second_demo_says_what_is_in_its_way(folder):
    command = [*POWERLESS, sys.executable, "-m", "proxyd", "demo", "--admin-socket", f"{folder}/other.sock"]
    with Namespace("demo") as namespace, demo(namespace, folder):
        second = namespace.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY)
        out, err = second.communicate(timeout=DEADLINE)
    assert second.returncode == 1
    assert not out
    (line,) = err.decode().splitlines()
    assert "127.1.0.1:9376: address already in use" in line


def test_a_taken_port_is_named_and_the_rest_is_served(folder):
    with Namespace("demo") as namespace:
        taken = namespace.listen("127.96.0.10", 8080)
        with taken, demo(namespace, folder) as (_, said):
            rows = [line.split() for line in said.splitlines() if line.startswith("default")]
            assert {row[1]: row[8].rstrip(":") for row in rows} == {"web": "Failed", "web-sticky": "Serving"}
            assert "not serving: default/web:http 127.96.0.10:8080/TCP: Failed: " in said
            assert namespace.call(fetch, "http://127.0.0.1:30080/").startswith(b"hello from web-")


def test_what_a_killed_demo_left_is_removed_by_the_next(folder):
    # Not in /tmp itself, where other demos may run.
    with tempfile.TemporaryDirectory(prefix="d-") as temporary:
        with Namespace("demo") as namespace, demo(namespace, folder, temporary) as (process, _):
            (own,) = Path(temporary).glob("proxyd-demo-*")
            process.kill()
            process.communicate(timeout=DEADLINE)
            assert own.exists()
        with Namespace("demo") as namespace, demo(namespace, folder, temporary):
            assert not own.exists()
