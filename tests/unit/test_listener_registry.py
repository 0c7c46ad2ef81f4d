"""Listener classes: proxyd's own, and those that other distributions bring by entry points."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxyd.relay import registry
from proxyd.relay.tcp.listener import TcpListener
from tests.support.paths import REPOSITORY


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What was found is remembered for the life of a process."""
    registry.find.cache_clear()
    registry.load.cache_clear()
    yield
    registry.find.cache_clear()
    registry.load.cache_clear()


def install(folder: Path, name: str, points: str, *, kind: str = "dist-info", version: str = "1.2") -> None:
    """As an installer leaves a distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.{kind}"
    info.mkdir(parents=True)
    metadata = "METADATA" if kind == "dist-info" else "PKG-INFO"
    (info / metadata).write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(points)


def test_the_distribution_declares_its_own() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][registry.GROUP] == registry.OWN


def test_own_listeners_are_found_by_protocol() -> None:
    assert registry.load("TCP") is TcpListener
    with pytest.raises(LookupError, match="DCCP is not relayed here"):
        registry.load("DCCP")


@pytest.mark.parametrize("kind", ["dist-info", "egg-info"])
def test_another_distribution_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    install(tmp_path, "quiet", "[console_scripts]\nquiet = quiet:main\n", kind=kind)
    install(
        tmp_path,
        "acme-relay",
        "[proxyd.listeners]\nSCTP = acme.relay:Listener\nDCCP = acme.dccp:Listener\n",
        kind=kind,
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = registry.find()
    assert found.classes == {"SCTP": "acme.relay:Listener", "DCCP": "acme.dccp:Listener"}
    assert found.notes == (
        "DCCP listeners are acme.dccp:Listener of acme-relay 1.2",
        "SCTP listeners are acme.relay:Listener of acme-relay 1.2",
    )


def test_of_two_the_first_by_name_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zeta", "alpha"):
        install(tmp_path, name, f"[proxyd.listeners]\nTCP = {name}:Listener\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.find() == (
        {"TCP": "alpha:Listener"},
        (
            "TCP listeners are alpha:Listener of alpha 1.2",
            "TCP listeners: zeta:Listener of zeta 1.2 is left out: another distribution brings them too",
        ),
    )


def test_proxyd_itself_is_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "proxyd", "[proxyd.listeners]\nTCP = elsewhere:Listener\n", version="9.9")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.find() == ({}, ())


def test_a_broken_one_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_listener.py").write_text("raise RuntimeError('half installed')\n")
    (tmp_path / "empty_listener.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="broken_listener:Listener: RuntimeError: half installed"):
        registry.load("TCP", "broken_listener:Listener")
    with pytest.raises(ImportError, match="empty_listener:Listener: AttributeError"):
        registry.load("TCP", "empty_listener:Listener")


def test_looking_costs_no_import_where_nobody_else_is() -> None:
    script = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        "from proxyd.relay import registry\n"
        "assert registry.find() == ({}, ()), registry.find()\n"
        "print(sorted(m for m in sys.modules if m == 'importlib.metadata' or m.startswith('proxyd.relay.')))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "['proxyd.relay.registry']"
