"""Every command run for real against a daemon that serves, its output compared with what happens and is served."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from proxyd.cli.client import Client, UnreachableError
from proxyd.cli.env import FAILED, CommandError
from proxyd.control.admin.schema import ServiceView, StatusView
from tests.support.clients import connect, many, read_line, refused
from tests.support.daemon import COMMAND, Proxyd, resident_kib
from tests.support.manifests import endpoints, endpoints_at, service, write
from tests.support.netlab import CLIENT_POD_IP, NODE_IP, Lab
from tests.support.paths import REPOSITORY
from tests.support.waiting import DEADLINE, wait_for

VIP = "10.96.0.10"
OTHER_VIP = "10.96.0.11"
DEAD_VIP = "10.96.0.12"
Run = Callable[..., Proxyd]


def labelled(name: str, vip: str, labels: dict[str, str], **options: Any) -> dict[str, Any]:
    made = service(name, vip, **options)
    made["metadata"]["labels"] = labels
    return made


@pytest.fixture
def daemon(lab: Lab, manifests: Path, proxyd: Run) -> Proxyd:
    """Serves web with three endpoints and a NodePort, other with one, and dead with one that nobody listens on."""
    write(
        manifests / "web.yaml",
        labelled("web", VIP, {"app": "web", "tier": "front"}, node_port=30080),
        endpoints("web", 1, 2, 3),
    )
    write(manifests / "other.yaml", labelled("other", OTHER_VIP, {"app": "other"}), endpoints("other", 1))
    write(manifests / "dead.yaml", service("dead", DEAD_VIP), endpoints_at("dead", CLIENT_POD_IP))
    running = proxyd(workers=2)
    running.wait_listener(VIP, 80)
    running.wait_listener(DEAD_VIP, 80)
    return running


def output(daemon: Proxyd, *words: str) -> str:
    done = daemon.cli(*words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def items(daemon: Proxyd, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(output(daemon, "get", *words, "-o", "json"))["items"]
    return found


def rows(text: str) -> list[dict[str, str]]:
    """A table's lines by heading; its cells hold no two spaces."""
    heading, *lines = text.splitlines()
    names = heading.split()
    return [
        dict(zip(names, [cell for cell in line.split("  ") if cell.strip()], strict=False)) for line in lines
    ]


# get


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("app=web", {"web"}),
        ("app!=web", {"other", "dead"}),
        ("app in (web,other),tier", {"web"}),
        ("app,!tier", {"other"}),
        ("tier notin (front)", {"other", "dead"}),
    ],
)
def test_get_by_label(daemon: Proxyd, selector: str, names: set[str]) -> None:
    for what in ("services", "endpoints", "listeners"):
        assert {item["name"] for item in items(daemon, what, "-l", selector)} == names


def test_get_in_every_format(daemon: Proxyd) -> None:
    assert output(daemon, "get", "services", "-o", "name").split() == [
        "default/dead",
        "default/other",
        "default/web",
    ]
    assert output(daemon, "get", "endpoints", "web", "-o", "name").split() == [
        f"10.244.0.{n}:9376" for n in (11, 12, 13)
    ]
    shown = rows(output(daemon, "get", "services", "web"))
    assert [(row["NAME"], row["CLUSTER-IP"], row["ENDPOINTS"], row["STATUS"]) for row in shown] == [
        ("web", VIP, "3/3", "Serving")
    ]
    as_yaml = output(daemon, "get", "services", "web", "-o", "yaml")
    assert "clusterIps:\n" in as_yaml
    assert f"- {VIP}\n" in as_yaml


def test_get_connections(lab: Lab, daemon: Proxyd) -> None:
    assert items(daemon, "connections") == []
    with ExitStack() as stack:
        socks = [stack.enter_context(connect(lab.client, VIP, 80)) for _ in range(8)]
        socks.append(stack.enter_context(connect(lab.client, OTHER_VIP, 80)))
        for sock in socks:
            sock.sendall(b"echo\nbefore\n")
            assert read_line(sock) == "before"
        found = items(daemon, "connections")
        assert {(item["client"], item["frontend"]) for item in found} == {
            (f"{sock.getsockname()[0]}:{sock.getsockname()[1]}", f"{sock.getpeername()[0]}:80")
            for sock in socks
        }
        assert {item["worker"] for item in found} <= set(daemon.worker_pids())
        assert {item["state"] for item in found} == {"established"}
        assert all(item["bytesIn"] >= 12 and item["bytesOut"] >= 7 for item in found)
        assert all(0 <= item["age"] < 30 for item in found)
        assert {item["endpoint"] for item in found} == {f"10.244.0.{n}:9376" for n in (11, 12, 13)}
        assert len(items(daemon, "connections", "web")) == 8
        assert len(items(daemon, "connections", "-l", "app=other")) == 1
        assert len(items(daemon, "connections", "-n", "nowhere")) == 0
        shown = rows(output(daemon, "get", "connections", "other"))
        assert [(row["SERVICE"], row["ENDPOINT"], row["STATE"]) for row in shown] == [
            ("default/other", "10.244.0.11:9376", "established")
        ]
    wait_for(lambda: items(daemon, "connections") == [], "the connections to end")


def test_a_half_closed_connection_says_so(lab: Lab, daemon: Proxyd) -> None:
    with connect(lab.client, VIP, 80) as sock:
        sock.sendall(b"early k\n")
        assert read_line(sock) == "early"
        wait_for(
            lambda: [one["state"] for one in items(daemon, "connections")] == ["half-closed"], "the state"
        )


def test_get_connections_is_bounded_and_holds_nobody_up(lab: Lab, daemon: Proxyd) -> None:
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connect(lab.client, VIP, 80))
        wait_for(lambda: len(items(daemon, "connections", "web")) == 1000, "1,000 connections")
        status, answer = raw(daemon, b"GET /v1/connections?limit=10 HTTP/1.0\r\n\r\n")
        assert status == 200
        assert len(answer["items"]) == 10
        assert answer["more"] == 990


# --watch


@contextmanager
def watching(daemon: Proxyd, *words: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A command that runs on, and the lines that it has printed so far."""
    lines: list[str] = []
    command = [*COMMAND, "get", *words, "--watch", "--admin-socket", str(daemon.socket)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    ) as process:
        assert process.stdout is not None

        def gather() -> None:
            assert process.stdout is not None
            lines.extend(line.rstrip("\n") for line in process.stdout)

        thread = threading.Thread(target=gather)
        thread.start()
        try:
            yield process, lines
        finally:
            if process.poll() is None:
                process.kill()
            thread.join(10)


def test_watching_services(manifests: Path, daemon: Proxyd) -> None:
    with watching(daemon, "services") as (process, lines):
        wait_for(lambda: len(lines) == 4, "the services")
        write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
        wait_for(lambda: len(lines) == 5, "the change")
        (manifests / "other.yaml").unlink()
        wait_for(lambda: len(lines) == 6, "the removal")
        assert [line.split()[:3] for line in lines[1:]] == [
            ["ADDED", "default", "dead"],
            ["ADDED", "default", "other"],
            ["ADDED", "default", "web"],
            ["CHANGED", "default", "web"],
            ["REMOVED", "default", "other"],
        ]
        assert "1/1" in lines[4].split()
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_watching_as_json_and_the_end_of_the_daemon(manifests: Path, daemon: Proxyd) -> None:
    with watching(daemon, "endpoints", "web", "-o", "json") as (process, lines):
        wait_for(lambda: len(lines) == 3, "the endpoints")
        write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1, 2))
        wait_for(lambda: len(lines) == 4, "the change")
        said = [json.loads(line) for line in lines]
        assert [(one["event"], one["object"]["address"]) for one in said[3:]] == [
            ("REMOVED", "10.244.0.13:9376")
        ]
        assert daemon.stop() == 0
        assert process.wait(DEADLINE) == 4
        assert process.stderr is not None
        errors = process.stderr.read().splitlines()
        assert len(errors) == 2
        assert errors[0].startswith("proxyd: warning: the daemon is gone")
        assert errors[1].startswith("proxyd: error: no daemon")


def test_watching_across_a_restart(lab: Lab, manifests: Path, daemon: Proxyd, proxyd: Run) -> None:
    with watching(daemon, "services") as (process, lines):
        wait_for(lambda: len(lines) == 4, "the services")
        assert daemon.stop() == 0
        proxyd(workers=1).wait_listener(VIP, 80)
        write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
        wait_for(lambda: lines[-1].split()[:3] == ["CHANGED", "default", "web"] and "1/1" in lines[-1], "it")
        assert process.poll() is None


# describe


def test_describe_tells_failures_and_events(lab: Lab, manifests: Path, daemon: Proxyd) -> None:
    assert many(lab.client, VIP, 80, 6).total == 6
    turned_away = many(lab.client, DEAD_VIP, 80, 3)
    assert len(turned_away.broken + turned_away.refused) == 3

    def failures() -> list[dict[str, Any]]:
        said = json.loads(output(daemon, "describe", "service", "dead", "-o", "json"))
        found: list[dict[str, Any]] = said["failures"]
        return found if sum(one["count"] for one in found) == 6 else []

    found = wait_for(failures, "three failed attempts and three clients turned away")
    assert {(one["endpoint"], one["count"]) for one in found} == {(f"{CLIENT_POD_IP}:9376", 3), ("", 3)}
    assert all(abs(one["time"] - time.time()) < 120 for one in found)
    text = output(daemon, "describe", "service", "dead")
    assert "Connection refused" in text
    assert "Status:            Serving" in text

    said = json.loads(output(daemon, "describe", "service", "default/web", "-o", "json"))
    assert said["service"]["clusterIps"] == [VIP]
    assert said["service"]["labels"] == {"app": "web", "tier": "front"}
    assert [one["counters"]["opened"] for one in said["endpoints"]] == [2, 2, 2]
    assert all(one["counters"]["connectUs"] > 0 for one in said["endpoints"])
    assert {(one["address"], one["port"]) for one in said["listeners"]} >= {(VIP, 80), (NODE_IP, 30080)}
    assert f"Opened {VIP}:80/TCP" in {event["what"] for event in said["events"]}

    write(manifests / "web.yaml", service("web", VIP))
    daemon.wait_listener(VIP, 80, "NoEndpoints")
    events = json.loads(output(daemon, "describe", "service", "web", "-o", "json"))["events"]
    assert {f"NoEndpoints {VIP}:80/TCP", f"Closed {VIP}:80/TCP"} <= {event["what"] for event in events}


def test_describe_of_what_is_not_there(daemon: Proxyd) -> None:
    for name in ("nothing", "default/nothing"):
        done = daemon.cli("describe", "service", name)
        assert (done.returncode, done.stdout) == (1, "")
        assert "not found" in done.stderr
        assert len(done.stderr.splitlines()) == 1


# top


def test_top_without_a_terminal(lab: Lab, daemon: Proxyd) -> None:
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            many(lab.client, OTHER_VIP, 80, 5)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        services, endpoint_lines = output(daemon, "top", "--interval", "1s").split("\n\n")
    finally:
        stop.set()
        thread.join()
    first = rows(services)[0]
    assert first["SERVICE"] == "default/other"
    assert float(first["CONN/S"].replace(",", "")) > 0
    assert rows(endpoint_lines)[0]["ENDPOINT"] == "10.244.0.11:9376"


# Completion asks the daemon for names


COMPLETE = {
    "bash": """source <(proxyd completion bash)
COMP_WORDS=(proxyd describe service -o json default/); COMP_CWORD=5
_proxyd; printf '%s\\n' "${COMPREPLY[@]}" """,
    "fish": "proxyd completion fish | source; complete -C 'proxyd describe service -o json default/'",
    # zsh completes in its line editor alone: the function that looks for names, and what it would add.
    "zsh": """compdef() { }; compadd() { print -l ${(P)2} }; source <(proxyd completion zsh); _proxyd_services""",
}


@pytest.mark.parametrize("shell", COMPLETE)
def test_completion_offers_the_services_of_the_daemon(shell: str, tmp_path: Path, daemon: Proxyd) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    # The script asks the daemon that commands find by themselves: here one that has its socket elsewhere.
    called = tmp_path / "proxyd"
    socket_flag = f"--admin-socket {shlex.quote(str(daemon.socket))}"
    called.write_text(
        f'#!/bin/sh\n[ "$1" = get ] && set -- "$@" {socket_flag}\nexec {shlex.join(COMMAND)} "$@"\n'
    )
    called.chmod(0o755)
    done = subprocess.run(
        [shell, "-c", COMPLETE[shell]],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)},
    )
    assert (set(done.stdout.split()), done.stderr) == ({"default/web", "default/other", "default/dead"}, "")


# reload, log-level, version, status


def test_reload_says_what_it_found(manifests: Path, daemon: Proxyd) -> None:
    assert output(daemon, "reload") == "read 3 files, 3 services: 0 errors, 0 warnings\n"
    write(manifests / "bad.yaml", service("bad", VIP, port=70000))
    done = daemon.cli("reload")
    assert done.returncode == 3
    problem, summary = done.stdout.splitlines()
    assert problem.startswith(f"{manifests}/bad.yaml:")
    assert "spec.ports[0].port" in problem
    assert summary == "read 4 files, 3 services: 1 error, 0 warnings"
    assert (
        json.loads(daemon.cli("reload", "-o", "json").stdout)["problems"][0]["subject"]
        == "Service default/bad"
    )


def test_the_log_level_is_set_at_run_time(lab: Lab, daemon: Proxyd) -> None:
    assert output(daemon, "log-level") == "info\n"
    assert output(daemon, "log-level", "error") == "error\n"
    before = daemon.log()
    output(daemon, "reload")
    assert daemon.log() == before
    assert output(daemon, "log-level", "info") == "info\n"
    output(daemon, "reload")
    wait_for(lambda: '"reloading"' in daemon.log()[len(before) :], "the reload in the log")
    done = daemon.cli("log-level", "loud")
    assert done.returncode == 2


def test_version_of_the_daemon(daemon: Proxyd) -> None:
    said = json.loads(output(daemon, "version", "--daemon", "-o", "json"))
    assert said["daemon"]["pid"] == daemon.pid
    assert said["daemon"]["version"] == said["version"]
    assert f"pid {daemon.pid}" in output(daemon, "version", "--daemon")


# drain


def test_drain_lets_connections_finish(lab: Lab, daemon: Proxyd) -> None:
    with connect(lab.client, VIP, 80) as sock:
        sock.sendall(b"echo\nbefore\n")
        assert read_line(sock) == "before"
        assert (
            output(daemon, "drain", "--no-wait", "--timeout", "50s") == "draining 1 connection, 50s at most\n"
        )
        wait_for(lambda: refused(lab.outside, NODE_IP, 30080), "new connections to be refused")
        # Again: it stays as it was told first.
        assert output(daemon, "drain", "--no-wait", "--timeout", "0").startswith("draining 1 connection, 50s")
        assert json.loads(output(daemon, "status", "-o", "json"))["phase"] == "draining"
        assert json.loads(output(daemon, "get", "listeners", "-o", "json")) == {"items": []}
        assert "0 listeners" in output(daemon, "status")
        sock.sendall(b"after\n")
        assert read_line(sock) == "after"
    assert daemon.wait() == 0


def test_drain_waits_for_the_end(lab: Lab, daemon: Proxyd) -> None:
    with connect(lab.client, VIP, 80) as sock:
        sock.sendall(b"echo\nbefore\n")
        assert read_line(sock) == "before"
        begin = time.monotonic()
        said = output(daemon, "drain", "--timeout", "1s").splitlines()
        assert 0.8 < time.monotonic() - begin < 25  # what it would be without the flag
    assert said == ["draining 1 connection, 1s at most", "it has ended"]
    assert daemon.wait() == 0


def test_workers_are_out_of_reach_of_ctrl_c(daemon: Proxyd) -> None:
    for pid in daemon.worker_pids():
        assert os.getpgid(pid) != os.getpgid(daemon.pid)


# cleanup --kube-proxy


def test_chains_of_kube_proxys_userspace_mode_go_only_when_asked(lab: Lab, folder: Path) -> None:
    def node(*argv: str) -> str:
        return lab.node.run(*argv)

    for chain in ("KUBE-PORTALS-HOST", "KUBE-NODEPORT-CONTAINER", "KUBE-SERVICES"):
        node("iptables", "-t", "nat", "-N", chain)
        node("iptables", "-t", "nat", "-A", "PREROUTING", "-m", "comment", "--comment", "a; b", "-j", chain)
    node("iptables", "-t", "nat", "-A", "KUBE-PORTALS-HOST", "-d", "10.0.0.1", "-j", "ACCEPT")

    def cleanup(*flags: str) -> subprocess.CompletedProcess[str]:
        with lab.node.popen(
            [*COMMAND, "cleanup", *flags, "--admin-socket", str(folder / "none.sock")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
        ) as process:
            out, err = process.communicate(timeout=DEADLINE)
            return subprocess.CompletedProcess([], process.returncode, out.decode(), err.decode())

    named = cleanup()
    assert named.returncode == 0
    assert "KUBE-PORTALS-HOST" in named.stderr
    assert "proxyd cleanup --kube-proxy" in named.stderr
    dry = cleanup("--kube-proxy", "--dry-run")
    assert dry.stdout.startswith("would remove iptables")
    assert "KUBE-PORTALS-HOST" in node("iptables-save", "-t", "nat")
    done = cleanup("--kube-proxy")
    assert done.returncode == 0
    assert "table nat: KUBE-NODEPORT-CONTAINER, KUBE-PORTALS-HOST" in done.stdout
    left = node("iptables-save", "-t", "nat")
    assert "KUBE-PORTALS" not in left
    assert "KUBE-NODEPORT-" not in left
    assert "-j KUBE-SERVICES" in left
    assert "KUBE-SERVICES" in done.stderr


# Nobody there, or somebody else


ASKING = (
    ("get", "services"),
    ("get", "connections"),
    ("get", "services", "--watch"),
    ("describe", "service", "web"),
    ("top",),
    ("status",),
    ("reload",),
    ("drain",),
    ("log-level",),
    ("version", "--daemon"),
)


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
def test_a_dead_daemon_is_one_line(folder: Path, words: tuple[str, ...]) -> None:
    path = folder / "dead.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    done = subprocess.run(
        [*COMMAND, *words, "--admin-socket", str(path)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        cwd=REPOSITORY,
    )
    assert (done.returncode, done.stdout) == (4, "")
    (line,) = done.stderr.splitlines()
    assert line == f"proxyd: error: no daemon listens at {path} any more; start it with `proxyd run`"


# The admin API


def raw(daemon: Proxyd, request: bytes, timeout: float = 10) -> tuple[int, Any]:
    """Status and JSON of an answer to these very bytes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout)
        sock.connect(str(daemon.socket))
        sock.sendall(request)
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    ("request_line", "status", "says"),
    [
        ("GET /v1/nothing", 404, "no path /v1/nothing"),
        ("GET /v1/services/default/none", 404, "service default/none not found"),
        ("DELETE /v1/services", 405, "DELETE is not possible"),
        ("GET /v1/reload", 405, "GET is not possible"),
        ("GET /v1/services?nam=x", 400, 'unknown parameter "nam"'),
        ("GET /v1/services?name=x&name=y", 400, "given twice"),
        ("GET /v1/services?labelSelector=a%3D%3D%3Db", 400, "label selector"),
        ("GET /v1/connections?limit=0", 400, "limit: expected a number"),
        ("GET /v1/services?revision=x&wait=long", 400, "wait: expected seconds"),
        ("PUT /v1/log-level", 400, "expected"),
        ("POST /v1/drain?timeout=-1", 400, "timeout: expected seconds"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_as_json(
    daemon: Proxyd, request_line: str, status: int, says: str
) -> None:
    got, answer = raw(daemon, f"{request_line} HTTP/1.0\r\nContent-Length: 0\r\n\r\n".encode())
    assert got == status
    unknown_path = {"reason": "NoSuchPath"} if says.startswith("no path") else {}
    assert answer == {"error": answer["error"], **unknown_path}
    assert says in answer["error"]


def test_a_daemon_that_has_not_what_a_command_asks_for_is_of_another_version(daemon: Proxyd) -> None:
    client = Client(str(daemon.socket))
    with pytest.raises(UnreachableError, match="has no /v1/later; it is of another version"):
        client.get("/v1/later", StatusView, {"name": "x"})
    with pytest.raises(CommandError, match="service default/none not found") as caught:
        client.get("/v1/services/default/none", ServiceView)
    assert caught.value.code == FAILED


def test_waiting_for_a_change(manifests: Path, daemon: Proxyd) -> None:
    _, first = raw(daemon, b"GET /v1/services HTTP/1.0\r\n\r\n")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(50)  # it is answered when something changes, not when its time is over
        sock.connect(str(daemon.socket))
        ask = f"GET /v1/services?revision={first['revision']}&wait=60 HTTP/1.0\r\n\r\n"
        sock.sendall(ask.encode())
        write(manifests / "other.yaml", service("other", OTHER_VIP), endpoints("other", 1, 2))
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
    said = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert said["revision"] != first["revision"]


def test_hostile_clients_change_nothing_for_others(daemon: Proxyd) -> None:
    begin = daemon.status()["workers"]
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(200)]
        for number, sock in enumerate(socks):
            sock.settimeout(5)  # of those that it does not read from
            wait_for(lambda sock=sock: sock.connect_ex(str(daemon.socket)) == 0, "room in the backlog")  # type: ignore[misc]  # a bound default has no type
            try:
                match number % 4:
                    case 0:  # says nothing
                        pass
                    case 1:  # never ends its headers
                        sock.sendall(b"GET /v1/services HTTP/1.1\r\nX: ")
                    case 2:  # asks again and again, and never reads
                        sock.sendall(b"GET /v1/listeners HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
                    case _:  # headers without end
                        sock.sendall(b"GET /v1/services HTTP/1.1\r\n" + b"X: y\r\n" * 20_000)
            except (BrokenPipeError, ConnectionResetError, TimeoutError):
                pass
        assert len(items(daemon, "services")) == 3
        assert sum(1 for _ in Path(f"/proc/{daemon.pid}/fd").iterdir()) < 200
    assert daemon.status()["workers"] == begin
    assert "Traceback" not in daemon.log()
    assert "internal error" not in daemon.log()
    assert resident_kib(daemon.pid) < 200_000
