"""Where the tests of SCTP run: here, if this kernel has SCTP, else in one machine for all of them (see tests/vm)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "integration"), str(HERE.parent.parent)]

from tests.vm.errors import has_sctp  # noqa: E402 the path is made above
from tests.vm.remote import RemoteTests  # noqa: E402

# Minutes each, so only on demand: make test-sctp-long.
collect_ignore = [] if os.environ.get("PROXYD_TEST_LONG") else ["test_sctp_long.py"]

_REMOTE = pytest.StashKey[RemoteTests]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if has_sctp():
        return
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    config.stash[_REMOTE] = RemoteTests(config, ours)
    for item in ours:
        # Its limit holds in the machine; here there is the boot as well.
        item.add_marker(pytest.mark.timeout(0), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    remote = item.config.stash.get(_REMOTE, None)
    if remote is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in remote.run(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    remote = session.config.stash.get(_REMOTE, None)
    if remote is not None:
        remote.close()
