"""The machine that other tests run in: what a command sees in it, and what comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent


def run_vm(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.vm", *words],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_output_and_status_come_back_and_only_the_named_folder_is_written(tmp_path: Path) -> None:
    kept, dropped = tmp_path / "kept", tmp_path / "dropped"
    kept.mkdir()
    dropped.mkdir()
    script = f"""
        test -d /proc/net/sctp && ip netns add a && echo "$WORD in $PWD"
        echo problem >&2
        echo 1 >{kept}/file; echo 1 >{dropped}/file; ls {dropped}
        exit 7
    """
    done = run_vm("--quiet", "--rw", str(kept), "--", "sh", "-c", script, WORD="it's")
    assert (done.returncode, done.stdout, done.stderr) == (7, f"it's in {REPOSITORY}\nfile\n", "problem\n")
    assert (kept / "file").read_text() == "1\n"
    assert not list(dropped.iterdir())


def test_missing_kernel_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    done = run_vm("--", "true", PROXYD_VM_CACHE=str(tmp_path))
    assert done.returncode == 125
    assert done.stderr.startswith(f"vm: no kernel in {tmp_path}; run: ")
    assert done.stderr.count("\n") == 1
