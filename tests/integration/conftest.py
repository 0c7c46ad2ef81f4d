"""Fixtures of the integration tests: a lab, a short folder for one daemon, and the rights that both need."""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Proxyd
from tests.support.netlab import Lab, become_root, missing_tools


@pytest.fixture(scope="session", autouse=True)
def _rights() -> None:
    # Some tests hold thousands of connections.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    missing = missing_tools()
    if missing:
        pytest.fail(
            f"these commands are needed: {' '.join(missing)} (packages iproute2, nftables, util-linux)"
        )
    try:
        become_root()
    except OSError as error:
        pytest.fail(
            f"network namespaces are needed: run as root, or where user namespaces are allowed ({error})"
        )


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab of three pods, for one test."""
    with Lab() as made:
        yield made


@pytest.fixture
def lab6() -> Iterator[Lab]:
    """The same with IPv6."""
    with Lab(ipv6=True) as made:
        yield made


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: the path of a Unix socket has at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="proxyd-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def manifests(folder: Path) -> Path:
    """An empty folder of manifests."""
    path = folder / "manifests"
    path.mkdir()
    return path


@pytest.fixture
def proxyd(lab: Lab, folder: Path, manifests: Path) -> Iterator[Callable[..., Proxyd]]:
    """Makes `proxyd run` over the manifests in the lab's node and starts it; ended with the test."""
    made: list[Proxyd] = []

    def run(**options: object) -> Proxyd:
        daemon = Proxyd(lab.node, folder, manifests, **options)  # type: ignore[arg-type]  # as Proxyd takes them
        made.append(daemon)
        return daemon.start()

    yield run
    for daemon in made:
        daemon.__exit__()
