"""What the daemon shows, asked over a real admin socket; and who may be behind that socket."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxyd.control.admin.server import AdminError, AdminServer
from tests.support.commandline import ask, run
from tests.support.pictures import Shown


@pytest.fixture
async def admin(tmp_path) -> AsyncIterator[str]:
    path = str(tmp_path / "run" / "admin.sock")
    server = AdminServer(path, Shown())
    await server.start()
    yield path
    await server.stop()


# What the daemon shows


async def test_get_services(admin):
    got = await ask("get", "services", "-A", "--admin-socket", admin)
    assert got.code == 0
    assert not got.err
    lines = got.out.splitlines()
    assert lines[0].split() == [
        "NAMESPACE",
        "NAME",
        "TYPE",
        "CLUSTER-IP",
        "EXTERNAL-IP",
        "PORT(S)",
        "ENDPOINTS",
        "CONNS",
        "STATUS",
    ]
    assert [line.split()[1] for line in lines[1:]] == ["db", "dns", "ext", "sig", "web", "late"]


async def test_get_services_of_one_namespace(admin):
    got = await ask("get", "services", "-n", "test", "--admin-socket", admin)
    assert [line.split()[1] for line in got.out.splitlines()[1:]] == ["late"]
    got = await ask("get", "services", "-n", "empty", "--admin-socket", admin)
    assert (got.code, got.out, got.err) == (0, "", "no services in namespace empty\n")


@pytest.mark.parametrize("what", ["services", "endpoints", "listeners"])
async def test_get_one_by_name_as_json(admin, what):
    for name in (["web"], ["prod/web"], ["web", "-n", "prod"]):
        got = await ask("get", what, *name, "-o", "json", "--admin-socket", admin)
        items = json.loads(got.out)["items"]
        assert items
        assert {(item["namespace"], item["name"]) for item in items} == {("prod", "web")}


async def test_get_what_is_not_there(admin):
    got = await ask("get", "services", "nothing", "--admin-socket", admin)
    assert (got.code, got.out) == (1, "")
    assert got.err.startswith("proxyd: error: service nothing: not found")


async def test_wide_tables_say_more(admin):
    narrow = await ask("get", "services", "--admin-socket", admin)
    wide = await ask("get", "services", "-o", "wide", "--admin-socket", admin)
    assert "5.0 MB" in wide.out
    assert "5.0 MB" not in narrow.out


async def test_status(admin):
    got = await ask("status", "--admin-socket", admin)
    assert got.code == 0
    assert got.out.startswith("proxyd 0.1.0  serving  up ")
    got = await ask("status", "-o", "json", "--admin-socket", admin)
    said = json.loads(got.out)
    assert said["pid"] == 812
    assert said["listeners"] == {"Serving": 2, "NoEndpoints": 3, "Disabled": 1, "Conflict": 1}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_colour_on_a_terminal_unless_no_color(admin):
    command = ("get", "services", "--admin-socket", admin)
    assert "\033[32mServing" in (await ask(*command, stdout=Terminal())).out
    assert "\033" not in (await ask(*command, stdout=Terminal(), environ={"NO_COLOR": "1"})).out
    assert "\033" not in (await ask(*command)).out


# The admin socket


def mode(path: str | Path) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


def remove(path: str) -> None:
    Path(path).unlink()


def exists(path: str) -> bool:
    return Path(path).exists()


async def test_the_socket_is_for_owner_and_group_alone(admin):
    assert mode(admin) == 0o660
    assert mode(Path(admin).parent) & 0o007 == 0


async def test_a_live_daemons_socket_is_refused_with_its_pid(admin):
    with pytest.raises(AdminError, match=f"is in use by pid {os.getpid()}"):
        await AdminServer(admin, Shown()).start()
    assert (await ask("status", "--admin-socket", admin)).code == 0


async def test_a_dead_daemons_socket_is_replaced(tmp_path):
    path = str(tmp_path / "admin.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
        left.listen()
    server = AdminServer(path, Shown())
    await server.start()
    assert (await ask("status", "--admin-socket", path)).code == 0
    await server.stop()
    assert not exists(path)


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "admin.sock"
    path.write_text("precious")
    with pytest.raises(AdminError, match="exists and is not a socket"):
        await AdminServer(str(path), Shown()).start()
    assert path.read_text() == "precious"


async def test_stopping_leaves_a_successors_socket(tmp_path):
    path = str(tmp_path / "admin.sock")
    old, new = AdminServer(path, Shown()), AdminServer(path, Shown())
    await old.start()
    remove(path)
    await new.start()
    await old.stop()
    assert (await ask("status", "--admin-socket", path)).code == 0
    await new.stop()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder with the name of the fallback in /tmp, in which anybody may write."""
    folder = Path(f"/tmp/proxyd-test{os.getpid()}")
    folder.mkdir()
    folder.chmod(0o777)
    yield folder
    folder.rmdir()


async def test_a_folder_of_somebody_else_is_not_trusted(open_folder):
    with pytest.raises(AdminError, match="not a private folder of yours"):
        await AdminServer(f"{open_folder}/admin.sock", Shown()).start()
    got = run("status", "--admin-socket", f"{open_folder}/admin.sock")
    assert got.code == 4
    assert "not a private folder" in got.err


def unreachable(path: str) -> str:
    got = run("get", "services", "--admin-socket", path)
    assert got.code == 4
    assert not got.out
    (line,) = got.err.splitlines()
    assert line.startswith("proxyd: error: ")
    return line


def test_no_daemon(tmp_path):
    assert "start it with `proxyd run`" in unreachable(str(tmp_path / "admin.sock"))
    assert "no daemon at" in unreachable(str(tmp_path / "nowhere" / "admin.sock"))


def test_a_daemon_that_died(tmp_path):
    path = str(tmp_path / "admin.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    assert "no daemon listens" in unreachable(path)
    (tmp_path / "file").write_text("")
    assert "no daemon listens" in unreachable(str(tmp_path / "file"))


@contextmanager
def foreign(path: str, answer: bytes) -> Iterator[None]:
    """Something else that listens: it answers one request."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(10)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\nServer: other\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nServer: proxyd/9\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 404 Not Found\r\nServer: proxyd/9\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nServer: proxyd/9\r\nContent-Length: 99\r\n\r\n{",
    ],
)
def test_what_listens_is_not_our_daemon(tmp_path, answer):
    path = str(tmp_path / "admin.sock")
    with foreign(path, answer):
        unreachable(path)


async def test_a_revision_is_of_one_program_also_where_the_next_has_its_pid_and_socket(tmp_path):
    path = str(tmp_path / "admin.sock")
    revisions = []
    for _ in range(2):
        server = AdminServer(path, Shown())
        await server.start()
        got = await ask("get", "services", "-o", "json", "--admin-socket", path)
        assert got.code == 0
        revisions.append(server.revision)
        await server.stop()
    assert revisions[0] != revisions[1]
