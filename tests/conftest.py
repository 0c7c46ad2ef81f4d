"""What holds for every test run: the event loop is the daemon's, and in CI a test that did not run is a failure."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest
import uvloop

pytest.register_assert_rewrite("tests.support")

_NOT_RUN = ("skipped", "xfailed", "xpassed", "deselected")


def pytest_configure() -> None:
    from tests.support.signals import give_defaults_to_children

    give_defaults_to_children()


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


def _not_run(config: pytest.Config) -> list[str]:
    if os.environ.get("CI") != "true":
        return []
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return []
    counts = {kind: len(reporter.stats.get(kind, [])) for kind in _NOT_RUN}
    return [f"{count} {kind}" for kind, count in counts.items() if count]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and _not_run(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    not_run = _not_run(config)
    if not_run:
        terminalreporter.write_line(f"CI runs every test, but {', '.join(not_run)}", red=True)
