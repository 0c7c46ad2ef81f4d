"""Runs commands: in this process with streams of its own, or as a process."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys

from proxyd.cli.env import Env
from proxyd.cli.main import main
from tests.support.paths import REPOSITORY
from tests.support.waiting import DEADLINE


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def run(*argv: str, environ: dict[str, str] | None = None, stdout: io.StringIO | None = None) -> Result:
    out, err = stdout or io.StringIO(), io.StringIO()
    code = main(argv, Env(stdout=out, stderr=err, environ=environ or {}))
    return Result(code, out.getvalue(), err.getvalue())


def process(*argv: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "proxyd", *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE, cwd=REPOSITORY, check=False, **options
    )


async def ask(*argv: str, **options) -> Result:
    """Run a command beside a server that this thread's loop serves."""
    return await asyncio.to_thread(run, *argv, **options)
