"""A first load in two processes is begun by a process without threads alone; the one that runs all tests has some."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_in_a_process_of_its_own() -> None:
    tests = Path(__file__).with_name("halves_alone.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout
