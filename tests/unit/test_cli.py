"""The command line: what every command has in common, and checking manifests."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from proxyd.cli.env import Env
from proxyd.cli.main import COMMANDS, build_parser
from tests.support.commandline import run
from tests.support.paths import REPOSITORY

# The command line


def test_no_command_prints_help():
    got = run()
    assert got.code == 2
    assert "usage: proxyd" in got.out
    assert not got.err


@pytest.mark.parametrize("argv", [("--help",), *((name, "--help") for name in COMMANDS)])
def test_help(argv):
    got = run(*argv)
    assert got.code == 0
    assert "usage: proxyd" in got.out
    assert not got.err


def test_every_flag_has_help():
    parser = build_parser(Env(stdout=io.StringIO(), stderr=io.StringIO(), environ={}))
    (commands,) = [action for action in parser._actions if action.dest == "command"]
    for name, command in commands.choices.items():
        for action in command._actions:
            flag = f"{name} {action.option_strings or action.dest}"
            if not action.option_strings:
                continue
            assert action.help, flag
            assert "\n" not in action.help, flag
            assert action.dest in {"help", "version"} or "default" in action.help, flag


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("gett",), 'unknown command "gett"; did you mean get?'),
        (("run", "--manifest", "x"), "unknown flag --manifest; did you mean --manifests?"),
        (
            ("get", "services", "--admin-sokcet=x"),
            "unknown flag --admin-sokcet; did you mean --admin-socket?",
        ),
        (("get", "services", "--zzz"), "unknown flag --zzz; see `proxyd get --help`"),
        (("run",), "--manifests or --kubeconfig is required"),
        (("run", "--manifests", "x", "--workers", "many"), "--workers: expected a number from 0 to 16"),
        (("get", "pods"), "see `proxyd get --help`"),
        (("get", "services", "a", "b"), 'unexpected argument "b"'),
        (("get", "services", "-A", "-n", "x"), "not allowed with"),
        (("status", "-o", "yaml"), "yaml"),
        (("run", "--manifests"), "expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(argv, says):
    got = run(*argv)
    assert got.code == 2
    assert not got.out
    (line,) = got.err.splitlines()
    assert line.startswith("proxyd: error: ")
    assert says in line


def test_underscores_stand_for_dashes():
    got = run("run", "--manifests", "a_b", "--drain_timeout=x_y")
    assert (
        got.err
        == 'proxyd: error: --drain-timeout: expected a duration such as 25s, 1m30s or 250ms, got "x_y"\n'
    )


def test_every_wrong_flag_has_its_line():
    got = run("run", "--manifests", "x", "--workers", "x", "--vip-mode", "y")
    assert got.code == 2
    assert len(got.err.splitlines()) == 2


def test_version():
    assert run("version").out == run("--version").out
    assert run("version").out.startswith("proxyd 0.")
    assert json.loads(run("version", "-o", "json").out)["version"] == run("version").out.split()[1]


def test_manifests_that_are_not_there():
    got = run("run", "--manifests", "nowhere", "--manifests", str(REPOSITORY), "--manifests", "gone")
    assert got.code == 3
    assert got.err.splitlines() == [
        "proxyd: error: --manifests: nowhere: no such file or folder",
        "proxyd: error: --manifests: gone: no such file or folder",
    ]


# Checking manifests

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: prod}
spec:
  clusterIP: 10.0.0.10
  ports:
    - port: %s
---
apiVersion: v1
kind: Endpoints
metadata: {name: web, namespace: prod}
subsets:
  - addresses: [{ip: 10.1.0.1}]
    ports: [{port: 80}]
"""


def test_check_of_good_manifests(tmp_path):
    (tmp_path / "web.yaml").write_text(SERVICE % 80)
    got = run("check", str(tmp_path))
    assert (got.code, got.err) == (0, "")
    assert got.out == "checked 1 file, 1 service, 1 endpoints object: 0 errors, 0 warnings\n"
    assert run("check", "-q", str(tmp_path)).out == ""


def test_check_of_bad_manifests(tmp_path):
    (tmp_path / "web.yaml").write_text(SERVICE % "eighty")
    got = run("check", str(tmp_path))
    assert got.code == 3
    problems, summary = got.out.splitlines()[:-1], got.out.splitlines()[-1]
    assert any(
        line.startswith(f"{tmp_path}/web.yaml:7:") and "spec.ports[0].port" in line for line in problems
    )
    assert "1 error" in summary
    quiet = run("check", "-q", str(tmp_path))
    assert quiet.code == 3
    assert quiet.out.splitlines() == problems


def test_check_of_nothing(tmp_path):
    got = run("check", str(tmp_path / "missing"))
    assert got.code == 3
    assert "no such file or folder" in got.out


# What only a real process shows


def test_a_closed_pipe_is_no_error(tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "".join(f"---\nkind: Service\nmetadata: {{name: s{n}}}\n" for n in range(3000))
    )
    command = f"{sys.executable} -m proxyd check {tmp_path} | head -1"
    got = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=REPOSITORY, check=False
    )
    assert len(got.stdout.splitlines()) == 1
    assert not got.stderr


def test_asking_does_not_load_the_daemons_libraries():
    code = (
        "import sys; from proxyd.cli.main import main; main(['get', 'services', '--admin-socket', '/nonexistent/x']);"
        "print(*{m.split('.')[0] for m in sys.modules})"
    )
    got = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=REPOSITORY, check=True
    )
    loaded = set(got.stdout.split())
    assert "msgspec" in loaded
    assert not loaded & {"aiohttp", "pyroute2", "uvloop", "asyncio", "structlog", "yaml"}


def test_help_loads_next_to_nothing():
    code = "import sys; from proxyd.cli.main import main; main(['--help']); print(*sys.modules)"
    got = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=REPOSITORY, check=True
    )
    assert not {"msgspec", "asyncio", "socket"} & set(got.stdout.split())
