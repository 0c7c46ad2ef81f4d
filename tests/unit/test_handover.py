"""What a program makes of what it finds when it begins: of another program, or of somebody else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# It runs in a process of its own, as it closes what that process inherited. Says which descriptors are open then.
PROGRAM = """
import os, sys
from proxyd.control.handover import VARIABLE, take
inherited = os.dup(1)
os.set_inheritable(inherited, True)
memory = os.memfd_create("proxyd-handover", 0)  # inheritable, as execve found it
os.write(memory, b"of no known version")
own = os.open("/dev/null", os.O_WRONLY)
os.environ[VARIABLE] = sys.argv[1].replace("MEMORY", str(memory))
assert take() is None
assert VARIABLE not in os.environ
print(*(os.path.exists(f"/proc/self/fd/{one}") for one in (inherited, memory, own)))
"""


@pytest.mark.parametrize(
    ("text", "are_open"),
    [
        ("", "True True True"),
        ("check it", "True True True"),
        ("0", "True True True"),
        ("999999", "True True True"),
        ("1" * 5000, "True True True"),
        ("MEMORY", "False False True"),
    ],
    ids=["none", "words", "another descriptor", "no descriptor", "no number", "unreadable"],
)
def test_only_what_an_unreadable_program_left_is_closed(text: str, are_open: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, text],
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    # The log may say more, before it.
    assert done.stdout.splitlines()[-1] == are_open
