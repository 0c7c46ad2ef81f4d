"""What a program makes of what it finds when it begins: of another program, or of somebody else."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from proxyd.api.service import Protocol
from proxyd.control.workers.handover import DrainingWorker
from proxyd.control.workers.old_workers import DrainingWorkers
from proxyd.state.spec import ListenerKey

# It runs in a process of its own, as it closes what that process inherited. Says which descriptors are open then.
PROGRAM = """
import os, sys
from proxyd.control.workers.handover import VARIABLE, take
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

# Has another thread when signals are held and one comes; then it becomes a program that says what waits for it.
HOLDS = """
import asyncio, os, signal, sys
from proxyd.control.runtime.signal_mask import executor
from proxyd.control.signals import hold_signals

async def main():
    loop = asyncio.get_running_loop()
    heard = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        loop.add_signal_handler(number, heard.append, number)
    loop.set_default_executor(executor())
    await asyncio.to_thread(int)
    await hold_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    assert not heard
    says = "import signal; print([one.name for one in signal.sigpending()])"
    os.execv(sys.executable, [sys.executable, "-c", says])

import uvloop
uvloop.run(main())
"""


def test_a_signal_that_comes_right_before_the_next_program_waits_for_it() -> None:
    for _ in range(5):  # any of the threads may get it
        done = subprocess.run(
            [sys.executable, "-c", HOLDS],
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.stdout, done.stderr) == ("['SIGTERM']\n", "")


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


def test_a_listener_of_several_addresses_is_handed_on_with_all_of_them() -> None:
    """As a multi-homed SCTP listener has them: relays need each, and go when none is wanted."""
    first, second = (ListenerKey(ip, 3868, Protocol.SCTP) for ip in ("10.96.0.1", "10.96.0.2"))

    async def adopt(process: subprocess.Popen[bytes]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        ended: list[int] = []
        with theirs:
            left = DrainingWorker(process.pid, ours.detach(), [(7, *first), (7, *second)])
            workers = DrainingWorkers([left], lambda *_: None, lambda: None, ended.append)
            try:
                assert workers.keys() == {first, second}
                workers.let_go({second}, 1.0)  # its relays may go on
                with pytest.raises(BlockingIOError):
                    theirs.recv(1000)
                (again,) = workers.hand_over()
                assert sorted(again.listeners) == [(7, *first), (7, *second)]
                workers.let_go(set(), 1.0)
                assert theirs.recv(1000)
            finally:
                workers.kill()
            assert ended == [-process.pid]
            assert not workers.keys()

    with subprocess.Popen(["sleep", "60"]) as child:
        asyncio.run(adopt(child))


def test_a_program_that_is_only_asked_says_what_it_can_take_over(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "proxyd", "run", "--manifests", str(tmp_path)],
        env={"PYTHONPATH": os.pathsep.join(sys.path), "PROXYD_HANDOVER": "check"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"(proxyd-handover \d+\n)+", done.stdout)
