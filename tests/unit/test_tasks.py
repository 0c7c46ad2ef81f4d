"""Work beside the event loop: its outcome, and an end that does not wait for it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from proxyd.control.runtime.tasks import in_thread

ENDS = """
import asyncio, threading
from proxyd.control.runtime.tasks import in_thread

async def main():
    begun = threading.Event()
    def work():
        begun.set()
        threading.Event().wait()
    waits = asyncio.ensure_future(in_thread(work))
    await asyncio.to_thread(begun.wait)

asyncio.run(main())
"""


def test_what_it_returns_and_raises_is_handed_on() -> None:
    async def both() -> None:
        assert await in_thread(int, "7") == 7
        with pytest.raises(ValueError, match="seven"):
            await in_thread(int, "seven")

    asyncio.run(both())


def test_a_program_ends_while_work_is_under_way() -> None:
    """As one that is told to stop while it reads very many manifests."""
    done = subprocess.run(
        [sys.executable, "-c", ENDS],
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
