"""What all tests lean on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.waiting import NotInTime, eventually, wait_for

STARTER = """
import os, signal, subprocess, sys
from tests.support.signals import give_defaults_to_children
numbers = signal.SIGHUP, signal.SIGINT, signal.SIGQUIT
for number in numbers:
    signal.signal(number, signal.SIG_IGN)
give_defaults_to_children()
for number in numbers:
    os.kill(os.getpid(), number)
says = "import signal; print(*(signal.getsignal(n) is signal.SIG_IGN for n in (1, 2, 3)))"
print(subprocess.run([sys.executable, "-c", says], capture_output=True, text=True).stdout.strip())
"""


def test_programs_begin_with_default_signals_where_this_run_ignores_them() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTER],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False False False\n", "")


def test_a_wait_says_what_did_not_happen() -> None:
    seen = [3]
    assert wait_for(lambda: seen[0]) == 3
    with pytest.raises(NotInTime, match=r"wait_for\(lambda: seen\[1:\], timeout=0\.01\); last: \[\]$"):
        wait_for(lambda: seen[1:], timeout=0.01)
    with pytest.raises(NotInTime, match=r"not within 0\.01 s: more; last: False$"):
        wait_for(lambda: len(seen) > 1, "more", timeout=0.01)
    with pytest.raises(IndexError) as failed:
        wait_for(lambda: seen[1], "more")
    assert failed.value.__notes__ == ["while this was waited for: more"]


async def test_the_loop_goes_on_while_a_test_waits() -> None:
    asked = iter([0, 0, 5])
    assert await eventually(lambda: next(asked)) == 5
    with pytest.raises(NotInTime, match="never"):
        await eventually(lambda: None, "never", timeout=0.01)
