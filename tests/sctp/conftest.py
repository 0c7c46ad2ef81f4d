"""Where the tests of SCTP run: here, if this kernel has SCTP, else in one machine for all of them (see tests/vm)."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import sctp_probe
from tests.support.netlab import become_root
from tests.support.sctp_probe import Association, Server
from tests.support.sctplab import SctpLab, pod_ip
from tests.vm.errors import has_sctp
from tests.vm.remote import RemoteTests

HERE = Path(__file__).parent
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
    # This is called for the tests of other folders too.
    if remote is None or not item.path.is_relative_to(HERE):
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    lab = getattr(item, "funcargs", {}).get("sctp")
    if report.failed and lab is not None:
        report.sections.append(("log of proxyd", lab.log()[-20_000:]))
    return report


@pytest.fixture(scope="session")
def shared_lab() -> Iterator[SctpLab]:
    """The lab and the daemon of all tests."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    become_root()
    folder = Path(tempfile.mkdtemp(prefix="sctp-"))
    with SctpLab(folder) as lab:
        yield lab
    shutil.rmtree(folder)


@pytest.fixture
def sctp(shared_lab: SctpLab) -> Iterator[SctpLab]:
    """The same, where a test's Services are removed with it, whatever became of it."""
    yield shared_lab
    shared_lab.remove_services()


@pytest.fixture(params=["direct", "proxyd"])
def via(request: pytest.FixtureRequest) -> str:
    """Both ways to a server: what holds for peers that talk directly has to hold through proxyd."""
    return str(request.param)


@pytest.fixture
def join(sctp: SctpLab) -> Iterator[Callable[..., tuple[Association, Association]]]:
    """Makes a client and the server that it talks to, directly or through proxyd; closed with the test.

    Options are those of `sctp_probe.connect`, and with `server_` before them those of `sctp_probe.Server`.
    """
    with contextlib.ExitStack() as stack:

        def make(via: str = "proxyd", **options: Any) -> tuple[Association, Association]:
            for_server = {name[7:]: options.pop(name) for name in list(options) if name.startswith("server_")}
            server = stack.enter_context(Server(sctp.lab.pods[0], pod_ip(1), **for_server))
            if via == "direct":
                client = sctp_probe.connect(sctp.lab.client, server.ip, server.port, **options)
            else:
                client = sctp.service(server).connect(**options)
            return stack.enter_context(client), stack.enter_context(server.accept())

        yield make
