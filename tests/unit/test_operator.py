"""Commands without a daemon: narrow tables, selectors, completion in real shells, manual pages, what is remembered."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxyd.cli import completion, manual
from proxyd.cli.commands import COMMANDS
from proxyd.cli.get import resource_table
from proxyd.cli.grammar import subcommands
from proxyd.cli.rates import Sample, endpoint_rows, service_rows
from proxyd.cli.tables import Table, display_width, table, truncated
from proxyd.control.admin import views
from proxyd.control.admin.history import MAX_EVENTS, MAX_FAILURES, MAX_SERVICES, History
from proxyd.control.admin.schema import Counters
from proxyd.control.admin.selector import Selector, SelectorError
from proxyd.control.admin.server import AdminServer
from proxyd.control.workers.live_connections import LiveQuery
from proxyd.host.kubechains import removal
from proxyd.relay.engine.listing import LOOKED_AT_ONCE, Listings
from proxyd.relay.ipc.channel import Channel
from proxyd.relay.ipc.messages import Failure, ListConnections, LiveConnection, LiveConnections
from tests.support.commandline import ask, process, run
from tests.support.paths import REPOSITORY
from tests.support.pictures import Shown, picture

# Tables


@pytest.mark.parametrize("width", [40, 60, 80, 100])
@pytest.mark.parametrize("what", ["services", "endpoints", "listeners"])
def test_a_table_fits_the_terminal_and_keeps_what_matters(what, width):
    items = getattr(views, what)(picture())
    lines = resource_table(what, items, width=width).splitlines()
    assert len(lines) == len(items) + 1
    assert max(map(display_width, lines)) <= width
    headings = lines[0].split()
    for needed in {"services": ("NAME", "STATUS"), "endpoints": ("NAME", "ENDPOINT")}.get(
        what, ("ADDRESS", "STATUS")
    ):
        assert needed in headings


def test_without_a_terminal_nothing_is_left_out():
    items = views.services(picture())
    whole = resource_table("services", items)
    assert "Conflict: 10.0.0.10:80/TCP is held by prod/web" in whole
    assert resource_table("services", items, width=40, wide=True) == resource_table(
        "services", items, wide=True
    )


def test_texts_are_cut_by_what_they_take_on_a_terminal():
    assert truncated("abcdef", 6) == "abcdef"
    assert truncated("abcdef", 4) == "abc…"
    assert truncated("日本語", 4) == "日…"
    assert table(["A", "STATUS"], [["x" * 30, "Serving"]], width=20).splitlines()[1] == "xxxxxxxxxx…  Serving"


def test_rows_that_come_later_keep_the_columns():
    drawn = Table(["NAME", "STATUS"])
    drawn.draw([["somewhat-long", "a"]])
    assert drawn.draw([["b", "c"]]) == "b              c\n"


# Selectors


@pytest.mark.parametrize(
    ("text", "labels", "admits"),
    [
        ("", {}, True),
        ("a=b", {"a": "b"}, True),
        ("a=b", {}, False),
        ("a==b", {"a": "c"}, False),
        ("a!=b", {}, True),
        ("a!=b", {"a": "b"}, False),
        ("a in (b, c)", {"a": "c"}, True),
        ("a in (b,c)", {"a": "d"}, False),
        ("a notin (b,c)", {"a": "d"}, True),
        ("a notin (b,c)", {}, True),
        ("a", {"a": ""}, True),
        ("!a", {"a": ""}, False),
        ("! a", {}, True),
        ("a=", {"a": ""}, True),
        ("a=b , c", {"a": "b", "c": "x"}, True),
        ("example.com/a in (x),b!=y", {"example.com/a": "x"}, True),
        ("in in (in)", {"in": "in"}, True),
    ],
)
def test_selectors_as_kubernetes_reads_them(text, labels, admits):
    assert Selector(text).admits(labels) is admits


@pytest.mark.parametrize(
    "text", ["a=b,", ",", "a in b", "a in (b", "=b", "a=b=c", "a b", "-a", "a in (-)", "a" * 5000]
)
def test_what_is_no_selector_is_said_in_one_line(text):
    with pytest.raises(SelectorError) as caught:
        Selector(text)
    assert "\n" not in str(caught.value)
    got = (
        run("get", "services", "-l", text)
        if not text.startswith("-")
        else run("get", "services", f"-l{text}")
    )
    assert got.code == 2
    assert len(got.err.splitlines()) == 1


# Completion, in the shells themselves

BASH = """
source <("$PYTHON" -m proxyd completion bash)
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _proxyd; printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = '"$PYTHON" -m proxyd completion fish | source; complete -C "$argv"'


def shell(name: str, *arguments: str) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        [name, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        check=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.stderr == ""
    return done.stdout


COMPLETED = [
    (["proxyd", "lo"], {"log-level"}),
    (["proxyd", "get", ""], {"services", "endpoints", "listeners", "connections"}),
    (["proxyd", "get", "services", "-o", ""], {"table", "wide", "json", "yaml", "name"}),
    (["proxyd", "log-level", "d"], {"debug"}),
    (["proxyd", "drain", "--no"], {"--no-wait"}),
    (["proxyd", "--v"], {"--version"}),
    # A flag's value is neither a command nor an argument.
    (["proxyd", "get", "-n", "check", "ser"], {"services"}),
    (["proxyd", "run", "--tcp-splice", "--manif"], {"--manifests"}),
    (["proxyd", "check", "Makefile", "pyproj"], {"pyproject.toml"}),
]
# bash makes a word of each =.
EQUALS_IN_BASH = [
    (["proxyd", "get", "services", "--output", "=", "js"], {"json"}),
    (["proxyd", "get", "services", "--output", "="], {"table", "wide", "json", "yaml", "name"}),
    (["proxyd", "get", "--namespace", "=", "prod", "ser"], {"services"}),
    (["proxyd", "check", "--config", "=", "pyproj"], {"pyproject.toml"}),
    (["proxyd", "run", "--tcp-splice", "=", "false", "--manif"], {"--manifests"}),
]
EQUALS_IN_FISH = [
    (["proxyd", "get", "services", "--output=js"], {"--output=json"}),
    (["proxyd", "get", "--namespace=prod", "ser"], {"services"}),
    (["proxyd", "check", "--config=pyproj"], {"--config=pyproject.toml"}),
]


@pytest.mark.parametrize(("words", "expected"), COMPLETED + EQUALS_IN_BASH)
def test_completion_in_bash(words, expected):
    assert set(shell("bash", "--norc", "-c", BASH, "bash", *words).split()) == expected


@pytest.mark.parametrize(("words", "expected"), COMPLETED + EQUALS_IN_FISH)
def test_completion_in_fish(words, expected):
    lines = shell("fish", "--no-config", "-c", FISH, " ".join(words)).splitlines()
    assert {line.split("\t")[0] for line in lines} == expected


def test_completion_in_zsh(tmp_path):
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    (tmp_path / "_proxyd").write_text(completion.zsh(subcommands()))
    # zsh completes in its line editor alone: type into one.
    setup = f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -d {tmp_path}/dump; setopt nobeep; PS1='REA''DY '; stty -echo\n"
    with terminal(["zsh", "-f", "-i"], {"TERM": "dumb", "PATH": "/usr/bin:/bin"}) as typed:
        typed.say(setup)
        typed.until("READY ")
        for begun, ended in (
            ("proxyd log-", "proxyd log-level"),
            ("proxyd get conn", "proxyd get connections"),
            ("proxyd get -n check ser", "proxyd get -n check services"),
            ("proxyd get services --output=js", "--output=json"),
            ("proxyd run --tcp-splice --manif", "--manifests"),
            ("proxyd --v", "proxyd --version"),
            (f"proxyd check {REPOSITORY}/Makefile {REPOSITORY}/pyproj", "pyproject.toml"),
        ):
            typed.say(f"{begun}\t")
            typed.until(ended)
            typed.say("\x15")


# Manual pages


def test_every_command_has_a_page_with_all_its_flags():
    pages = manual.pages()
    kube_proxy = pages["proxyd-kube-proxy.1"].replace("\\-", "-")
    for name in ("cluster-cidr", "iptables-sync-period", "ipvs-scheduler", "windows-service", "cleanup"):
        assert f"\\fB--{name}\\fR" in kube_proxy
    assert set(pages) == {"proxyd.1", "proxyd-kube-proxy.1", *(f"proxyd-{name}.1" for name in COMMANDS)}
    for command in subcommands():
        page = pages[f"proxyd-{command.name}.1"].replace("\\-", "-")
        for argument in command.flags:
            for flag in argument.flags:
                assert f"\\fB{flag}\\fR" in page


@pytest.mark.parametrize(
    "checker",
    [["mandoc", "-T", "lint", "-W", "warning"], ["groff", "-man", "-Tutf8", "-ww", "-z"]],
    ids=lambda c: c[0],
)
def test_pages_are_well_formed(tmp_path, checker):
    if shutil.which(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not installed")
    assert manual.main([str(tmp_path)]) == 0
    for page in sorted(tmp_path.iterdir()):
        done = subprocess.run([*checker, str(page)], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, ""), page.name


# top


def sample(when: float, **counters: int) -> Sample:
    shown = picture(
        counters=lambda _: Counters(**counters), endpoint_counters=lambda _, __: Counters(**counters)
    )
    return Sample(when, views.services(shown), views.endpoints(shown))


def test_rates_are_differences_for_a_second():
    before, after = sample(10.0, opened=100, bytes_in=1000), sample(12.0, opened=140, bytes_in=9000, failed=1)
    (row,) = [row for row in service_rows(before, after, "rate") if row.name == "prod/web"]
    assert (row.rate, row.bytes_in, row.failed, row.connections) == (20.0, 4000.0, 0.5, 140)
    assert {row.rate for row in endpoint_rows(before, after, "name")} == {20.0}
    # Counted anew, as after a restart of the daemon.
    assert {row.rate for row in service_rows(after, sample(14.0, opened=1), "rate")} == {0.0}


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, master: int, started: subprocess.Popen[bytes]) -> None:
        self._master = master
        self.process = started
        self.seen = ""

    def say(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, text: str, seconds: float = 60) -> None:
        """Wait until the program has printed a text after the last one."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.seen[-2000:]!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                self.seen += os.read(self._master, 65536).decode("utf-8", "replace")
        self.seen = self.seen.split(text, 1)[1]


@contextmanager
def terminal(command: list[str], environ: dict[str, str]) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    with subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=REPOSITORY,
        env={**os.environ, **environ},
        start_new_session=True,
    ) as started:
        os.close(slave)
        try:
            yield Terminal(master, started)
        finally:
            if started.poll() is None:
                started.kill()
            started.wait()
            os.close(master)


@pytest.fixture
async def admin(tmp_path) -> AsyncIterator[str]:
    server = AdminServer(str(tmp_path / "admin.sock"), Shown())
    await server.start()
    yield server.path
    await server.stop()


@pytest.mark.parametrize("key", ["q", "\x03"])
async def test_top_on_a_terminal(admin, key):
    command = [sys.executable, "-m", "proxyd", "top", "--interval", "200ms", "--admin-socket", admin]

    def look() -> int:
        with terminal(command, {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}) as shown:
            shown.until("prod/web")
            shown.until("10.1.0.1:9376")
            shown.say("c")
            shown.until("prod/web")
            if key == "\x03":
                # The terminal is in a session without a foreground group of its own.
                shown.process.send_signal(signal.SIGINT)
            else:
                shown.say(key)
            shown.until("\x1b[?1049l")  # the screen is as it was
            return shown.process.wait(60)

    assert await asyncio.to_thread(look) == 0


async def test_top_once(admin):
    got = await ask("top", "--once", "--interval", "100ms", "--admin-socket", admin)
    assert got.code == 0
    assert "prod/web" in got.out
    assert "\033" not in got.out


@pytest.mark.parametrize("interval", ["0", "x", "2h"])
def test_top_wants_a_sensible_interval(interval):
    got = run("top", "--interval", interval)
    assert got.code == 2
    assert got.err.startswith("proxyd: error: --interval: expected a duration")


# The API while the daemon cannot do more than show


async def test_orders_to_a_daemon_that_is_starting(tmp_path):
    server = AdminServer(str(tmp_path / "admin.sock"), Shown(lambda: picture(phase="starting")))
    await server.start()
    for words in (("reload",), ("drain",), ("upgrade",), ("get", "connections")):
        got = await ask(*words, "--admin-socket", server.path)
        assert (got.code, got.out) == (4, "")
        assert got.err == "proxyd: error: the daemon is starting; try again\n"
    await server.stop()


async def test_every_path_is_documented(admin):
    text = (REPOSITORY / "docs" / "admin-api.md").read_text()
    documented = set(re.findall(r"^### (GET|POST|PUT) (\S+)$", text, re.MULTILINE))
    server = AdminServer(admin, Shown())
    served = {
        (route.method, route.resource.canonical.replace("{namespace}", "NAMESPACE").replace("{name}", "NAME"))
        for route in server._application().router.routes()
        if route.method != "HEAD"
    }
    assert documented == served


async def test_the_documented_fields_are_those_served(admin):
    text = (REPOSITORY / "docs" / "admin-api.md").read_text()
    for path, target in (
        ("/v1/services", "services"),
        ("/v1/endpoints", "endpoints"),
        ("/v1/listeners", "listeners"),
    ):
        example = json.loads(
            re.split(r"\n(?=\S)", text.split(f"### GET {path}\n")[1].split("\n    {", 1)[1])[0].join("{ ")
        )
        got = await ask("get", target, "-o", "json", "--admin-socket", admin)
        assert set(example["items"][0]) == set(json.loads(got.out)["items"][0])


async def test_describe_of_one_name_in_two_namespaces(admin):
    got = await ask("describe", "service", "web", "--admin-socket", admin)
    assert got.code == 0
    assert "Type:              NodePort" in got.out
    assert "10.1.0.1:9376" in got.out
    got = await ask("describe", "service", "nothing", "--admin-socket", admin)
    assert (got.code, got.err) == (
        1,
        "proxyd: error: service nothing not found; see `proxyd get services -A`\n",
    )


async def test_wide_output_in_yaml_is_yaml(admin):
    import yaml

    got = await ask("get", "services", "web", "-o", "yaml", "--admin-socket", admin)
    assert yaml.safe_load(got.out)["items"][0]["clusterIps"] == ["10.0.0.10"]


# What control remembers


def test_failures_of_one_kind_are_counted_and_bounded():
    now = 1000.0
    history = History(lambda: now)
    history.failed(
        [Failure("a/b:http", "10.0.0.1:80", "refused", 3), Failure("a/b:http", "10.0.0.1:80", "refused", 2)]
    )
    (view,) = history.failures("a", "b")
    assert (view.port, view.endpoint, view.why, view.count) == ("http", "10.0.0.1:80", "refused", 5)
    history.failed(Failure("a/b", f"10.0.0.{n}:80", "refused", 1) for n in range(100))
    assert len(history.failures("a", "b")) == MAX_FAILURES
    assert history.failures("a", "b")[0].endpoint == "10.0.0.99:80"
    history.failed(Failure(f"c/s{n}", "", "x", 1) for n in range(MAX_SERVICES))
    assert history.failures("a", "b") == ()
    assert len(history.failures("c", "s7")) == 1


def test_events_are_noted_once_and_bounded():
    history = History(lambda: 1.0)
    statuses = tuple(status for status in picture().statuses if str(status.state) != "Serving")
    history.unopened(statuses)
    history.unopened(tuple(statuses))
    history.unopened((*statuses,)[:-1] + statuses[-1:])
    assert [event.what for event in history.events("prod", "sig")] == [
        "Disabled 10.0.0.77:3868/SCTP: SCTPSupport"
    ]
    for _ in range(100):
        history.note(statuses[0].service_port, "x")
    assert (
        len(history.events(statuses[0].service_port.namespace, statuses[0].service_port.name)) == MAX_EVENTS
    )


# Asking the workers


class Relay:
    done = False

    def __init__(self, service: str) -> None:
        self.service = service

    def live(self, now: float) -> LiveConnection:
        return LiveConnection("c", "f", self.service, "e", "TCP", now, 1, 2, "established")


async def listed(relays: list[Relay], request: ListConnections) -> list[LiveConnections]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control, worker = Channel(ours), Channel(theirs)
    listings = Listings(asyncio.get_running_loop(), worker, relays)
    listings.ask(request)
    parts: list[LiveConnections] = []
    try:
        async with asyncio.timeout(60):
            while not parts or not parts[-1].last:
                await asyncio.sleep(0.001)
                while (received := control.receive()) is not None:
                    assert isinstance(received[0], LiveConnections)
                    parts.append(received[0])
    finally:
        listings.stop()
        control.close()
        worker.close()
    return parts


async def test_a_worker_lists_in_small_parts_up_to_the_limit():
    parts = await listed([Relay("a/b:http")] * 3000, ListConnections(1, limit=1000))
    assert sum(len(part.records) for part in parts) == 1000
    assert max(len(part.records) for part in parts) <= LOOKED_AT_ONCE
    assert parts[-1].more == 2000


async def test_a_worker_lists_what_was_asked_for():
    relays = [Relay("a/b:http"), Relay("a/bb"), Relay("b/b"), Relay("a/b")]
    for namespace, name, expected in (("a", "b", 2), ("", "b", 3), ("a", "", 3), ("c", "", 0)):
        parts = await listed(relays, ListConnections(1, 10, namespace, name))
        assert sum(len(part.records) for part in parts) == expected


async def test_a_worker_that_says_nothing_is_named():
    live_query = LiveQuery(lambda _: {0, 1})
    asking = asyncio.ensure_future(live_query.ask(seconds=0.2))
    await asyncio.sleep(0)
    live_query.answered(0, LiveConnections(1, [Relay("a/b").live(0.0)], last=True))
    live_query.answered(1, LiveConnections(1, [Relay("a/b").live(0.0)], last=False))
    found = await asking
    assert (len(found.records), found.silent) == (2, (1,))


async def test_a_worker_that_dies_does_not_hold_up_the_answer():
    live_query = LiveQuery(lambda _: {0})
    asking = asyncio.ensure_future(live_query.ask(seconds=20))
    await asyncio.sleep(0)
    live_query.worker_gone(0)
    assert (await asking).records == []


# kube-proxy's chains


def test_only_userspace_chains_are_removed():
    saved = """\
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-NODEPORT-HOST - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PORTALS-HOST - [0:0]
-A PREROUTING -m comment --comment "a; b" -j KUBE-PORTALS-HOST
-A PREROUTING -j KUBE-NODEPORTS
-A KUBE-PORTALS-HOST -d 10.0.0.1/32 -j REDIRECT
COMMIT
"""
    script, chains = removal("nat", saved)
    assert chains == ["KUBE-NODEPORT-HOST", "KUBE-PORTALS-HOST"]
    assert script.splitlines() == [
        "*nat",
        '-D PREROUTING -m comment --comment "a; b" -j KUBE-PORTALS-HOST',
        "-F KUBE-NODEPORT-HOST",
        "-F KUBE-PORTALS-HOST",
        "-X KUBE-NODEPORT-HOST",
        "-X KUBE-PORTALS-HOST",
        "COMMIT",
    ]
    assert removal("nat", "*nat\n:KUBE-NODEPORTS - [0:0]\nCOMMIT\n") == ("", [])


# The process


@pytest.mark.parametrize("imported", ["argparse", "msgspec", "proxyd.cli.main"])
def test_ctrl_c_while_it_starts_is_quiet(imported):
    # The interpreter tells of each module when it is imported: Ctrl-C comes right then, and before that the interpreter
    # says what it likes.
    start = [sys.executable, "-X", "importtime", "-m", "proxyd"]
    with subprocess.Popen(
        [*start, "run", "--manifests", "/dev/null", "--admin-socket", "/nonexistent/x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
    ) as started:
        assert started.stderr is not None
        seen = []
        for line in started.stderr:
            seen.append(line)
            if line.split("|")[-1].strip() == imported:
                break
        else:
            pytest.fail(f"{imported} was never imported: {''.join(seen)[-500:]}")
        started.send_signal(signal.SIGINT)
        errors = [line for line in started.stderr if not line.startswith("import time:")]
        started.wait(60)
    assert not [line for line in errors if "Traceback" in line or "KeyboardInterrupt" in line], errors


def test_completion_into_a_closed_pipe():
    command = f"{sys.executable} -m proxyd completion bash | head -1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=REPOSITORY, check=False
    )
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


def test_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "proxyd", "completion", "bash"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            cwd=REPOSITORY,
            check=False,
        )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_the_version_needs_no_daemon():
    assert process("version").stdout == run("version").out
