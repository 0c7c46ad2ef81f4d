"""Pytest plugin of the run in the machine: hands every report to the run outside, one line of JSON each."""

from __future__ import annotations

import json
import os

import pytest

DESCRIPTOR = "PROXYD_VM_REPORTS"  # names the descriptor that they are written to


class _Forwarder:
    def __init__(self, config: pytest.Config, descriptor: int) -> None:
        self._config = config
        self._descriptor = descriptor

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        line = memoryview(json.dumps(data).encode() + b"\n")
        while line:
            line = line[os.write(self._descriptor, line) :]


def pytest_configure(config: pytest.Config) -> None:
    descriptor = int(os.environ[DESCRIPTOR])
    os.set_inheritable(descriptor, False)
    config.pluginmanager.register(_Forwarder(config, descriptor))
