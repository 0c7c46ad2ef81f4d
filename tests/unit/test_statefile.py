"""The state file: what is kept between runs, and what becomes of a file that cannot be used."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from proxyd.api.meta import ObjectName
from proxyd.sources.standalone.allocation import Allocation, Allocations
from proxyd.sources.standalone.statefile import load_allocations, save_allocations

SOME = Allocations(
    services={
        ObjectName("prod", "web"): Allocation(
            created="2026-01-02T03:04:05.000006Z",
            cluster_ips=("10.96.0.7", "fd00::7"),
            node_ports={"http/TCP": 30080, "53/UDP": 30053},
        ),
        ObjectName("dev", "db"): Allocation(created="2026-01-02T03:04:05.000007Z"),
    }
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "state.json"
    assert save_allocations(str(path), SOME) == ""
    assert load_allocations(str(path)) == (SOME, "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]


def test_no_file_is_an_empty_state(tmp_path: Path) -> None:
    assert load_allocations(str(tmp_path / "state.json")) == (Allocations(), "")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"version": 2, "services": {}, "more": 1}',
        b'{"version": 1, "unknown": 1}',
        b'{"version": 1, "services": {"web": {}}}',
        b'{"version": 1, "services": {"prod/web": {"cluster_ips": ["10.0.0.999"]}}}',
        b'{"version": 1, "services": {"prod/web": {"node_ports": {"http/TCP": 0}}}}',
        b'{"version": 1, "services": {"prod/web": {"node_ports": {"http": 30000}}}}',
        b'{"version": 1, "services": {"prod/web": {"created": 3}}}',
    ],
)
def test_a_damaged_or_foreign_file_is_moved_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    allocations, message = load_allocations(str(path))
    assert allocations == Allocations()
    assert str(path) in message
    assert "moved to" in message
    assert "\n" not in message
    assert not path.exists()
    assert (tmp_path / "state.json.bad").read_bytes() == content
    assert save_allocations(str(path), SOME) == ""
    assert load_allocations(str(path)) == (SOME, "")


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    os.mkfifo(path)
    allocations, message = load_allocations(str(path))
    assert allocations == Allocations()
    assert message


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    path = str(blocker / "state.json")
    message = save_allocations(path, SOME)
    assert message == f"{path}: not saved (file exists): allocations may differ after a restart"
    blocker.unlink()
    assert save_allocations(path, SOME) == ""
    assert load_allocations(path) == (SOME, "")


def test_a_symbolic_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".state.json.new").symlink_to(victim)
    assert save_allocations(str(tmp_path / "state.json"), SOME) == ""
    assert victim.read_text() == "precious"


def test_a_process_killed_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    program = (
        "import sys\n"
        "from proxyd.api.meta import ObjectName\n"
        "from proxyd.sources.standalone.allocation import Allocation, Allocations\n"
        "from proxyd.sources.standalone.statefile import save_allocations\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    names = {ObjectName('prod', f's{i}'): Allocation(created=str(n)) for i in range(500)}\n"
        "    save_allocations(sys.argv[1], Allocations(services=names))\n"
        "    if n == 3: print('going', flush=True)\n"
    )
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"going\n"
            process.kill()
        allocations, message = load_allocations(str(path))
        assert message == ""
        assert len(allocations.services) == 500
        assert len({entry.created for entry in allocations.services.values()}) == 1
    assert len(list(tmp_path.iterdir())) <= 2
