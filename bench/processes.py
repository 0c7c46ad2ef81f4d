"""Processes of a bench: started in a namespace on chosen CPUs, ended with all that came of them; CPU and memory from /proc."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.net import Namespace

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, linux/prctl.h
_TICK = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """Something that ends the run; its text is one line for whoever started it."""


@dataclass(frozen=True)
class Cpu:
    """Seconds of processor time."""

    user: float
    system: float

    @property
    def total(self) -> float:
        return self.user + self.system

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(self.user - other.user, self.system - other.system)


@dataclass(frozen=True)
class Memory:
    """Bytes of a process tree: resident (what processes share counts for each) and proportional (it is divided)."""

    resident: int
    proportional: int


def tree(pid: int) -> list[int]:
    """A process and everything that came of it."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


class CpuMeter:
    """Reads the CPU of a process tree.

    The sum is exact to the nanosecond (schedstat of every thread). How it divides into user and system comes from the
    clock's ticks, whose sum is coarser: the share of the ticks between two readings is given to the exact sum.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._begin = self._read()

    def _read(self) -> tuple[float, int, int]:
        total, user, system = 0, 0, 0
        for pid in tree(self._pid):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                user += int(fields[11])
                system += int(fields[12])
                for task in Path(f"/proc/{pid}/task").iterdir():
                    total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9, user, system

    def lap(self) -> Cpu:
        """What was used since the last reading; begins the next one."""
        now = self._read()
        total, user, system = (each - then for each, then in zip(now, self._begin, strict=True))
        self._begin = now
        ticks = user + system
        share = user / ticks if ticks else 0.0
        return Cpu(total * share, total * (1 - share))


def memory(pid: int) -> Memory:
    """Memory of a process tree."""
    resident = proportional = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            fields = dict(
                line.split(":", 1) for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()[1:]
            )
            resident += int(fields["Rss"].split()[0]) * 1024
            proportional += int(fields["Pss"].split()[0]) * 1024
    return Memory(resident, proportional)


def busy_seconds() -> float:
    """Seconds that all CPUs of the machine have worked so far, whoever for; time stolen by the host included."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICK  # without idle and iowait


def used_by_children() -> float:
    """CPU seconds of this process and of those of its descendants that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ended, so that none is left when this process ends."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """Kill everything that came of this process, as often as something is left."""
    for _ in range(50):
        left = tree(os.getpid())[1:]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


class Program:
    """A program in a namespace. It ends with the bench, whatever becomes of that; Ctrl-C does not reach it by itself.

    Args:
        namespace: where it runs.
        argv: the command.
        cpus: CPUs that it may use, None for all.
        log: file that takes what it writes; None where it talks with the bench over pipes.
        folder: where it runs.
    """

    def __init__(
        self,
        namespace: Namespace,
        argv: Sequence[str],
        *,
        cpus: Sequence[int] | None = None,
        log: Path | None = None,
        folder: Path,
    ) -> None:
        pin = ["taskset", "--cpu-list", ",".join(map(str, cpus))] if cpus else []
        self.argv = list(argv)
        self.log = log
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(log.open("ab")) if log else subprocess.PIPE
            self.process: subprocess.Popen[str] = namespace.call(
                subprocess.Popen,
                ["setpriv", "--pdeathsig", "TERM", *pin, *argv],
                stdin=subprocess.DEVNULL if log else subprocess.PIPE,
                stdout=out,
                stderr=out if log else None,
                text=True,
                cwd=folder,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def line(self, what: str) -> str:
        """The next line that it writes.

        Raises:
            BenchError: it ended.
        """
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            raise BenchError(f"{what} ended with {self.process.wait()}: {' '.join(self.argv)}")
        return text.rstrip("\n")

    def say(self, text: str) -> None:
        """Write a line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def finish(self, timeout: float, what: str) -> str:
        """Wait for its end; the rest of what it wrote.

        Raises:
            BenchError: it failed, or did not end.
        """
        try:
            out, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{what} did not end in {timeout:.0f} s: {' '.join(self.argv)}") from None
        if self.process.returncode:
            told = out.strip().splitlines()[-1:] if out else []
            raise BenchError(f"{what} ended with {self.process.returncode}: {' '.join([*self.argv, *told])}")
        return out or ""

    def check_alive(self, what: str) -> None:
        """Raise BenchError, with its last line, where it ended."""
        if self.process.poll() is not None:
            told = self.log.read_text().strip().splitlines()[-1:] if self.log else []
            raise BenchError(f"{what} ended with {self.process.returncode}: {' '.join(told)}")

    def stop(self) -> None:
        """SIGTERM, ten seconds, SIGKILL to it and all that came of it."""
        mine = tree(self.pid)
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        # What its parent left behind is a child of the bench now: nobody else can have got its number.
        orphans = set(tree(os.getpid())) & set(mine)
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
