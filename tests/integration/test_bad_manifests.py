"""Bad manifests, each beside a good one: one exact line for every mistake, and every good Service really serving.

The table is tests/data/bad.txt: what `proxyd check -q` says of each file of tests/data/bad. What cannot be kept as a
file of the repository is in SPECIAL.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxyd.cli.env import Env
from proxyd.cli.main import main
from tests.support.clients import ask, refused
from tests.support.daemon import COMMAND, UNPRIVILEGED, Proxyd
from tests.support.manifests import Document, write
from tests.support.netlab import POD_PORT, Namespace
from tests.support.paths import DATA, REPOSITORY
from tests.support.pod_servers import PodServers
from tests.support.waiting import DEADLINE, wait_for

BAD = DATA / "bad"
TABLE = (DATA / "bad.txt").read_text().splitlines()
FLAGS = ("--allow-loopback-endpoints", "--service-cluster-ip-range", "127.96.0.0/16")
PORT = 8080
BACKEND = "127.1.0.1"
# Nothing in these files has the name of the good version: for proxyd that one was deleted.
RENAMED = {"name-has-capitals", "name-starts-with-a-digit", "name-too-long", "namespace-has-a-dot"}


def _service(name: str) -> str:
    return f"apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  ports:\n    - port: {PORT}\n      targetPort: {POD_PORT}\n"


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _unreadable(path: Path) -> None:
    path.write_text(_service("unreadable"))
    path.chmod(0)


def _content(data: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(data)

    return make


def _link(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.symlink_to(target)

    return make


def _large(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(50):
            file.write(b"- item\n" * ((1 << 20) // 7))


def _too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(65 << 20)


# By name: what makes the file, and the line that is said of it; "" for none.
SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (_content(b""), ""),
    "only-comments": (_content(b"# nothing yet\n---\n"), ""),
    "fifty-megabytes": (
        _large,
        "fifty-megabytes.yaml:1000000:3: error: a document of more than 1000000 values: split it",
    ),
    "too-large": (_too_large, "too-large.yaml: error: not read: it is over 64 MiB"),
    "a-fifo": (_fifo, "a-fifo.yaml: error: is a FIFO, not a file"),
    "a-socket": (_socket, "a-socket.yaml: error: is a socket, not a file"),
    "a-link-to-nothing": (
        _link("nothing.yaml"),
        "a-link-to-nothing.yaml: error: the symbolic link leads nowhere",
    ),
    "a-link-to-itself": (
        _link("a-link-to-itself.yaml"),
        f"a-link-to-itself.yaml: error: {os.strerror(errno.ELOOP).lower()}",
    ),
    "a-link-to-a-device": (_link("/dev/zero"), "a-link-to-a-device.yaml: error: is a device, not a file"),
    "unreadable": (_unreadable, f"unreadable.yaml: error: {os.strerror(errno.EACCES).lower()}"),
    "binary": (
        _content(b"\x7fELF\x02\x01\x01\0\0\0\0" + bytes(range(256))),
        "binary.yaml: error: the file is not text: it has NUL bytes",
    ),
    "compressed": (
        _content(b"\x1f\x8b\x08\x08abcd"),
        "compressed.yaml:1:2: error: not valid UTF-8 (byte 0x8b): save the file as UTF-8",
    ),
    "latin-1": (
        _content(("# caf\u00e9\n" + _service("latin-1")).encode("latin-1")),
        "latin-1.yaml:1:6: error: not valid UTF-8 (byte 0xe9): save the file as UTF-8",
    ),
    "utf-16-without-a-mark": (
        _content(_service("utf-16-without-a-mark").encode("utf-16-le")),
        "utf-16-without-a-mark.yaml: error: the file is not text: it has NUL bytes",
    ),
    "utf-16-cut-off": (
        _content(_service("utf-16-cut-off").encode("utf-16")[:-1]),
        "utf-16-cut-off.yaml: error: not valid UTF-16: save the file as UTF-8",
    ),
    "cut-within-a-character": (
        _content(_service("cut-within-a-character").encode() + b"# caf\xc3"),
        "cut-within-a-character.yaml:9:6: error: not valid UTF-8 (byte 0xc3): save the file as UTF-8",
    ),
}


def _said_of(line: str) -> str:
    """The file's name that a line of the table begins with."""
    return line.split(":", 1)[0]


STORED = {_said_of(line): line for line in TABLE}
EVERY = {Path(name).stem: name for name in STORED} | {name: f"{name}.yaml" for name in SPECIAL}


def test_the_table_is_complete() -> None:
    assert sorted(STORED) == sorted(path.name for path in BAD.iterdir())
    assert len(STORED) == len(TABLE) >= 60


@pytest.mark.parametrize("name", sorted(STORED))
def test_check_says_one_exact_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BAD)
    out, err = io.StringIO(), io.StringIO()
    code = main(["check", "-q", *FLAGS, name], Env(stdout=out, stderr=err))
    assert (code, out.getvalue(), err.getvalue()) == (3, f"{STORED[name]}\n", "")


def _check(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """The real command, as a user without rights."""
    return subprocess.run(
        [*UNPRIVILEGED, *COMMAND, "check", *FLAGS, *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def test_check_of_what_is_no_readable_file(folder: Path) -> None:
    for name, (make, _) in SPECIAL.items():
        make(folder / f"{name}.yaml")
    (folder / "a-folder.yaml").mkdir()
    done = _check(folder, ".")
    expected = [f"./{line}" for _, line in SPECIAL.values() if line]
    expected.append("./a-folder.yaml: warning: is a folder, not a file: read as a folder")
    *problems, summary = done.stdout.splitlines()
    assert sorted(problems) == sorted(expected)
    assert summary.endswith(f"{len(expected) - 1} errors, 1 warning")


# The running daemon


# Here it is the endpoints that are wrong in the bad file, and right in the good one; elsewhere they are in a file of their own.
OWN_ENDPOINTS = ("endpoint-", "slice-", "pod-")


def _good(name: str) -> list[Document]:
    """A Service, and what makes its endpoints."""
    meta: Document = {"name": name, "labels": {"app": name, "kubernetes.io/service-name": name}}
    service: Document = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {"ports": [{"port": PORT, "targetPort": POD_PORT}]},
    }
    ports = [{"name": "", "port": POD_PORT}]
    backend: Document = {
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": meta,
        "subsets": [{"addresses": [{"ip": BACKEND}], "ports": ports}],
    }
    if name.startswith("slice-"):
        backend = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": meta,
            "addressType": "IPv4",
            "endpoints": [{"addresses": [BACKEND]}],
            "ports": ports,
        }
    elif name.startswith("pod-"):
        service["spec"]["selector"] = {"app": name}
        backend = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "status": {"podIP": BACKEND}}
    return [service, backend]


def _list(*items: Document) -> str:
    """A file of these objects: as JSON, which is YAML too."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=1)


class Site:
    """A folder with every bad file in a folder of its own, and beside each a good Service `beside-N`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders = {name: root / f"{number:03}" for number, name in enumerate(EVERY)}
        for number, (name, folder) in enumerate(self.folders.items()):
            folder.mkdir(parents=True)
            (folder / "good.yaml").write_text(_list(*_good(f"beside-{number}")))
            if not name.startswith(OWN_ENDPOINTS):
                (folder / "endpoints.yaml").write_text(_list(*_good(name)[1:]))
        self.beside = [f"beside-{number}" for number in range(len(EVERY))]

    def path(self, name: str) -> Path:
        return self.folders[name] / EVERY[name]

    def make_bad(self) -> None:
        """Put every bad file in its place, at once as a rename does."""
        for name, path in ((name, self.path(name)) for name in EVERY):
            beside = path.with_name(".new")
            if name in SPECIAL:
                SPECIAL[name][0](beside)
            else:
                shutil.copyfile(BAD / EVERY[name], beside)
            if path.is_symlink() or path.exists():
                beside.replace(path)
            else:
                beside.rename(path)

    def make_good(self) -> None:
        for name in EVERY:
            items = _good(name)
            write(self.path(name), _list(*(items if name.startswith(OWN_ENDPOINTS) else items[:1])))

    def expected(self) -> set[str]:
        """The line of every file, as the daemon says it."""
        lines = {Path(file).stem: line for file, line in STORED.items()}
        lines |= {name: line for name, (_, line) in SPECIAL.items()}
        return {f"{self.folders[name]}/{line}" for name, line in lines.items() if line}


def _errors(daemon: Proxyd) -> set[str]:
    """The errors that the daemon's status names, as lines of `proxyd check`."""
    found = set()
    for problem in daemon.status()["problems"]:
        where = ":".join(str(problem[key]) for key in ("file", "line", "column") if problem[key])
        what = ": ".join(filter(None, (problem["subject"], problem["path"], problem["message"])))
        if problem["severity"] == "error":
            found.add(f"{where}: error: {what}")
    return found


def _vips(daemon: Proxyd) -> dict[str, str]:
    return {entry["name"]: entry["clusterIps"][0] for entry in daemon.get("services") if entry["clusterIps"]}


@pytest.fixture
def node() -> Iterator[Namespace]:
    """A namespace with one backend, on loopback."""
    with Namespace("bad") as namespace, PodServers() as servers:
        servers.add("backend", namespace.listen(BACKEND, POD_PORT))
        servers.start()
        yield namespace


def _serving(node: Namespace, vips: dict[str, str], names: list[str]) -> None:
    for name in names:
        assert name in vips, name
        assert ask(node, vips[name], PORT) == "backend", name


def test_every_bad_file_beside_a_good_one_in_a_running_daemon(node: Namespace, folder: Path) -> None:
    site = Site(folder / "m")
    site.make_bad()
    with Proxyd(node, folder, site.root, flags=FLAGS, unprivileged=True) as daemon:
        # Bad from the start.
        wait_for(lambda: len(_vips(daemon)) >= len(site.beside), "the good Services")
        _serving(node, _vips(daemon), site.beside)
        assert _errors(daemon) == site.expected()
        assert "Traceback" not in daemon.log()
        # What is many is logged in part, and counted.
        assert daemon.log().count("error: ") <= 25
        assert "more problems; `proxyd check` shows them all" in daemon.log()

        # Mended: all of them serve.
        site.make_good()
        wait_for(lambda: not _errors(daemon), "no error any more")
        vips = _vips(daemon)
        _serving(node, vips, [*site.beside, *EVERY])

        # Bad again: the good versions stay in force, with the addresses they had.
        site.make_bad()
        stored = {line for line in site.expected() if Path(line.split(": ")[0].split(":")[0]).name in STORED}
        wait_for(lambda: stored <= _errors(daemon), "the errors of every file")
        kept = [name for name in EVERY if name not in RENAMED | {"only-comments"}]
        wait_for(lambda: _vips(daemon).keys() == {*site.beside, *kept}, "those of files without them gone")
        _serving(node, vips, [*site.beside, *kept])
        for name in RENAMED:
            assert refused(node, vips[name], PORT), name

        # Gone: so is what they defined, and nothing else.
        for name in EVERY:
            shutil.rmtree(site.folders[name])
        wait_for(lambda: not _vips(daemon), "no Service left")
        assert _errors(daemon) == set()
        assert daemon.process.poll() is None
        assert "Traceback" not in daemon.log()


def test_a_watched_folder_that_is_removed(node: Namespace, folder: Path) -> None:
    one, other = folder / "one", folder / "other"
    for path in (one, other):
        (path / "deeper").mkdir(parents=True)
        (path / "web.yaml").write_text(_list(*_good(path.name)))
        (path / "deeper" / "web.yaml").write_text(_list(*_good(f"{path.name}-deeper")))
    with Proxyd(node, folder, one, other, flags=FLAGS, unprivileged=True) as daemon:
        names = ["one", "one-deeper", "other", "other-deeper"]
        wait_for(lambda: len(_vips(daemon)) == 4, "the Services")
        vips = _vips(daemon)
        _serving(node, vips, names)
        shutil.rmtree(one / "deeper")
        wait_for(lambda: "one-deeper" not in _vips(daemon), "the Service of a removed folder gone")
        assert _errors(daemon) == set()
        # What the operator named is not believed to be gone.
        shutil.rmtree(one)
        line = f"{one}: error: no such file or folder: what it defined stays in force"
        wait_for(lambda: _errors(daemon) == {line}, "a line about the missing folder")
        assert json.dumps(line)[1:-1] in daemon.log()
        _serving(node, vips, ["one", "other", "other-deeper"])
        one.mkdir()
        (one / "web.yaml").write_text(_list(*_good("one")))
        wait_for(lambda: not _errors(daemon), "the folder is there again")
        _serving(node, vips, ["one", "other", "other-deeper"])


def test_ten_thousand_problems_fill_no_log(node: Namespace, folder: Path, manifests: Path) -> None:
    bad = "".join(
        f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{number}}}\nspec: {{ports: [{{port: x}}]}}\n"
        for number in range(10_500)
    )
    write(manifests / "good.yaml", _list(*_good("good")))
    with Proxyd(node, folder, manifests, flags=FLAGS, unprivileged=True) as daemon:
        wait_for(lambda: "good" in _vips(daemon), "the good Service")
        before = len(daemon.log().splitlines())
        write(manifests / "bad.yaml", bad)
        wait_for(lambda: "more problems; `proxyd check` shows them all" in daemon.log(), "the end of the log")
        assert len(daemon.log().splitlines()) - before <= 25
        _serving(node, _vips(daemon), ["good"])
        assert len(_errors(daemon)) == 10_001
        (manifests / "bad.yaml").unlink()
        wait_for(lambda: not _errors(daemon), "no error any more")
        assert len(daemon.log().splitlines()) - before <= 30
    write(manifests / "bad.yaml", bad)
    done = _check(manifests, "bad.yaml")
    assert done.returncode == 3
    *lines, summary = done.stdout.splitlines()
    assert len(lines) == 10_001
    assert lines[0] == "bad.yaml: error: 500 more problems in this file, after the first 10000"
    assert lines[-1].startswith("bad.yaml:50000:23: error: Service default/s9999: spec.ports[0].port: ")
    assert summary == "checked 1 file: 10,001 errors, 0 warnings"


def test_a_running_daemon_is_in_nobodys_way(node: Namespace, folder: Path, manifests: Path) -> None:
    """`check` beside the daemon that serves these very manifests: its own ports are no problem, others' are."""
    items = _good("web")
    items[0]["spec"] |= {"type": "NodePort", "clusterIP": "127.96.0.7"}
    items[0]["spec"]["ports"] = [{"port": PORT, "targetPort": POD_PORT, "nodePort": 30080}]
    write(manifests / "web.yaml", _list(*items))
    command = [*COMMAND, "check", *FLAGS, str(manifests)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def said() -> str:
        done = node.call(
            subprocess.run,
            command,
            env=environ,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return str(done.stdout)

    clean = "checked 1 file, 1 service, 1 endpoints object: 0 errors, 0 warnings\n"
    with Proxyd(node, folder, manifests, flags=FLAGS) as daemon:
        daemon.wait_listener("127.0.0.1", 30080)
        daemon.wait_listener("127.96.0.7", PORT)
        assert said() == clean
    assert said() == clean
    with node.listen("::", 30080):
        assert "spec.ports[0].nodePort: NodePort 30080/TCP is in use on this node by " in said()
