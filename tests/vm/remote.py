"""Runs tests in a machine, and reports each of them here as if it had run here.

One machine boots for all of them. Where it fails in the middle, another one takes the tests that are left.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

import pytest

from tests.vm.errors import VmError
from tests.vm.forwarding import DESCRIPTOR
from tests.vm.machine import Machine, usable_accel

# Above the test's own limit, which holds in the machine: the first one waits for pytest to come up there.
_MARGIN = 120.0
_MACHINES = 3
_LIMIT = 360.0  # seconds that a test may take that does not say it itself
# Deadlines of the tests' helpers are this many times longer: emulated, everything takes about ten times as long.
_PATIENCE = "6"
# Reports go to the standard output of the machine, what pytest says to the other.
_SHELL = ["sh", "-c", 'exec 3>&1 >&2; exec "$@"', "sh"]


class RemoteTests:
    """The tests that run in a machine.

    Args:
        config: of this run; how much is shown is passed on.
        items: all that is to run, in order.
    """

    def __init__(self, config: pytest.Config, items: Sequence[pytest.Item]) -> None:
        self._config = config
        self._left = {item.nodeid: _limit(item) for item in items}
        self._reports: dict[str, list[pytest.TestReport]] = {}
        self._machine: Machine | None = None
        self._machines = 0
        self._buffer = b""
        self._words: deque[str] = deque(maxlen=40)
        self._listener: threading.Thread | None = None
        self._broken = ""

    def run(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """The reports of one test, once they are there; one that says why where the machine failed."""
        try:
            if self._machine is None:
                self._boot()
            self._await(item.nodeid)
        except VmError as error:
            self._end()
            tail = "".join(self._words)
            self._words.clear()
            yield _failure(item, f"{error}\n{tail}".strip())
        else:
            yield from self._reports.pop(item.nodeid)
        finally:
            self._left.pop(item.nodeid, None)
            if not self._left:
                self._end()

    def _boot(self) -> None:
        if self._broken:
            raise VmError(self._broken)
        if self._machines == _MACHINES:
            self._broken = f"{_MACHINES} machines have failed; the tests that are left do not run"
            raise VmError(self._broken)
        self._machines += 1
        option = self._config.option
        command = [
            *(*_SHELL, sys.executable, "-m", "pytest", "-p", "tests.vm.forwarding", "-p", "no:cacheprovider"),
            *(
                f"--timeout={_LIMIT}",
                "-q",
                f"--tb={option.tbstyle}",
                *["-v"] * (option.verbose + 1),
                *["-l"] * option.showlocals,
            ),
            *self._left,
        ]
        try:
            self._machine = Machine(
                command,
                accel=usable_accel(),
                environment={**os.environ, DESCRIPTOR: "3", "PROXYD_TEST_PATIENCE": _PATIENCE},
                folder=self._config.rootpath,
            )
        except VmError as error:
            self._broken = str(error)
            raise
        self._buffer = b""
        self._listener = threading.Thread(target=self._listen, args=(self._machine,), daemon=True)
        self._listener.start()
        self._machine.wait_started()

    def _listen(self, machine: Machine) -> None:
        while data := machine.stderr.read(1 << 16):
            self._words.extend(data.decode(errors="replace").splitlines(keepends=True))

    def _await(self, nodeid: str) -> None:
        """Wait for the last report of a test, that of its teardown.

        Raises:
            VmError: it does not come.
        """
        assert self._machine is not None
        deadline = time.monotonic() + self._left[nodeid] + _MARGIN
        while not any(report.when == "teardown" for report in self._reports.get(nodeid, ())):
            left = deadline - time.monotonic()
            if left <= 0:
                raise VmError(f"nothing was heard of this test for {self._left[nodeid] + _MARGIN:.0f} s")
            if not select.select([self._machine.stdout], [], [], left)[0]:
                continue
            data = self._machine.stdout.read(1 << 16)
            if not data:
                raise VmError("the machine ended without a report of this test; it said last:")
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                report = self._config.hook.pytest_report_from_serializable(
                    config=self._config, data=json.loads(line)
                )
                if isinstance(report.longrepr, list):  # of a skip: JSON has no tuples
                    report.longrepr = tuple(report.longrepr)
                self._reports.setdefault(report.nodeid, []).append(report)

    def _end(self) -> None:
        if self._machine is not None:
            self._machine.kill()
            if self._listener is not None:
                self._listener.join()
            self._machine.close()
            self._machine = None

    def close(self) -> None:
        """End the machine."""
        self._end()


def _limit(item: pytest.Item) -> float:
    """Seconds that a test may take."""
    marker = item.get_closest_marker("timeout")
    if marker is not None and marker.args:
        return float(marker.args[0])
    return _LIMIT


def _failure(item: pytest.Item, text: str) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome="failed",
        longrepr=text,
        when="call",
    )
