"""The bench: that it measures, that it sees wrong answers, that it leaves nothing behind. How fast anything is stays its own affair."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import is_alive
from tests.support.paths import REPOSITORY
from tests.support.waiting import DEADLINE, wait_for

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n"
RIGHT = HEAD + b"pod-1".ljust(1000, b".")


def bench(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Start `python -m bench` with its temporary files in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(folder), **environment},
    )


def mentioning(folder: Path) -> list[int]:
    """Processes whose command line has this folder in it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.fsencode(folder) in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return [pid for pid in found if is_alive(pid)]


def test_a_check_measures_both_proxies_and_prints_ratios(folder: Path) -> None:
    results = folder / "results.json"
    words = ("--check", "--tiny", "--rounds", "1", "--only", "connections,requests", "--json", str(results))
    process = bench(folder, *words)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors

    figures = json.loads(results.read_text())["figures"]
    for key in (
        "connections.cpu",
        "connections.rate",
        "requests.1.cpu",
        "requests.50.cpu",
        "requests.1000.cpu",
    ):
        assert {name: each["median"] > 0 for name, each in figures[key].items()} == {
            "proxyd": True,
            "haproxy": True,
        }
    # The whole is the sum of its parts, for each proxy.
    for name, each in figures["connections.cpu"].items():
        parts = figures["connections.user"][name]["median"] + figures["connections.system"][name]["median"]
        assert parts == pytest.approx(each["median"], rel=1e-3)
    head, *lines = [
        line.split() for line in out.splitlines() if "CPU per connection" in line or "ratio" in line
    ]
    assert head == ["proxyd", "haproxy", "ratio", "noise"]
    ours, theirs, ratio = map(float, lines[0][-4:-1])
    assert ratio == pytest.approx(ours / theirs, rel=0.02)
    assert [each.name for each in folder.iterdir()] == [results.name]


def test_a_bench_that_is_interrupted_leaves_nothing(folder: Path) -> None:
    process = bench(folder, "--check", "--tiny", "--only", "connections", "--rounds", "1000")
    try:
        wait_for(lambda: len(mentioning(folder)) >= 5, "pods and a proxy")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "bench: interrupted"
    assert "Traceback" not in errors
    # Workers of the proxies end by themselves, with those that started them.
    wait_for(lambda: mentioning(folder) == [], "their end")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "path", "code", "told"),
    [
        (("--only", "conections"), None, 2, "--only: unknown 'conections'"),
        (("--peers", "traefik"), None, 2, "--peers: unknown 'traefik'"),
        (("--check",), "/nowhere", 1, "wrk: apt-get install wrk"),
    ],
)
def test_mistakes_and_missing_tools_are_one_line(
    folder: Path, words: tuple[str, ...], path: str | None, code: int, told: str
) -> None:
    environment = {"PATH": path} if path else {}
    process = bench(folder, *words, **environment)
    out, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (code, "")
    assert told in errors
    assert len(errors.splitlines()) == 1


# The loads


@contextlib.contextmanager
def web(answer: bytes) -> Iterator[int]:
    """A server on loopback that gives everyone this answer; its port."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), connection:
                connection.recv(4096)
                connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield int(listening.getsockname()[1])
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
        listening.close()


@contextlib.contextmanager
def datagrams(change: bool) -> Iterator[int]:
    """An echo on loopback that may change a byte of each datagram; its port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))

        def serve() -> None:
            while True:
                data, peer = sock.recvfrom(2048)
                if not data:
                    return
                with contextlib.suppress(OSError):
                    sock.sendto(data[:-1] + b"!" if change else data, peer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(sock.getsockname()[1])
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
                end.sendto(b"", sock.getsockname())
            thread.join()


def load(program: str, *words: str) -> dict[str, Any]:
    """What a load of the bench finds."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "bench" / program), *words],
        input="go\n",
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    ready, told = done.stdout.splitlines()
    assert ready == "ready"
    found: dict[str, Any] = json.loads(told)
    return found


@pytest.mark.parametrize(
    ("answer", "answers", "errors"),
    [
        (RIGHT, 20, {}),
        (RIGHT[:-1] + b"!", 0, {"wrong answer": 20}),
        (RIGHT[:-1], 0, {"wrong answer": 20}),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", 0, {"wrong answer": 20}),
    ],
)
def test_every_answer_of_a_paced_load_is_compared(
    answer: bytes, answers: int, errors: dict[str, int]
) -> None:
    with web(answer) as port:
        found = load("load.py", "paced", f"127.0.0.1:{port}", "--rate", "100", "--seconds", "0.2")
    assert (found["answers"], found["errors"]) == (answers, errors)


def test_refused_connections_are_errors_of_a_paced_load() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{unheard.getsockname()[1]}"
        found = load("load.py", "paced", where, "--rate", "100", "--seconds", "0.2")
    assert (found["answers"], sum(found["errors"].values())) == (0, 20)


@pytest.mark.parametrize("mode", ["live", "fresh"])
def test_every_answer_to_a_datagram_is_compared(mode: str) -> None:
    with datagrams(change=False) as port:
        found = load("datagrams.py", mode, f"127.0.0.1:{port}", "--seconds", "1")
    assert found["answered"] > 0
    assert found["wrong"] == 0
    with datagrams(change=True) as port:
        found = load("datagrams.py", mode, f"127.0.0.1:{port}", "--seconds", "1")
    assert found["answered"] == 0
    assert found["wrong"] > 0
