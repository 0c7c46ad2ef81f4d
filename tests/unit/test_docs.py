"""What documents name is there: files and folders of the project, and what `make` makes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
# Where a path may begin: at the root, as in a shell there, or at the package, as rooms are spoken of.
BASES = (REPOSITORY, REPOSITORY / "proxyd")
# What starts there and is made by commands.
MADE = ("build", "dist", ".venv")
# Names end so only where they are of files of the project, or absolute.
ENDINGS = (".py", ".md")


def quoted(text: str) -> list[str]:
    """Everything in backquotes, lines put together."""
    return [re.sub(r"\s+", " ", found) for found in re.findall(r"`([^`]+)`", text)]


def expanded(path: str) -> list[str]:
    """`a/{b,c}.py` as the shell takes it: two paths."""
    parts = re.split(r"\{([^{}]*)\}", path)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def of_project(path: str) -> bool:
    """Whether a text in backquotes is meant as a path of the project."""
    if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_./{},-]*", path) or path.startswith(MADE):
        return False
    first = path.split("/", maxsplit=1)[0]
    return path.endswith(ENDINGS) or ("/" in path and any((base / first).is_dir() for base in BASES))


def missing(text: str, folder: Path) -> list[str]:
    """The paths of the project that a document in `folder` names, and that are not there."""
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    found = [one for one in links if not (folder / one).exists()]
    for path in quoted(text):
        if of_project(path):
            places = (*BASES, folder)
            found += [one for one in expanded(path) if not any((base / one).exists() for base in places)]
    return found


def unknown_targets(text: str) -> list[str]:
    """What a document says to `make`, in backquotes or in a block of commands, and the Makefile has not."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    said = re.findall(r"(?:`|^    |^    \$ )make ([a-z][a-z-]*)", text, re.MULTILINE)
    return [target for target in said if target not in known]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_that_a_document_names_exist(document: Path):
    assert missing(document.read_text(encoding="utf-8"), document.parent) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_targets_that_a_document_names_exist(document: Path):
    assert unknown_targets(document.read_text(encoding="utf-8")) == []


def test_what_is_not_there_is_found():
    text = """
    See `proxyd/relay/worker.py`, `relay/worker.py`, `control/{admin,nowhere}`, `worker.py`, `bench/none.json`,
    [one](docs/none.md), [other](README.md), [elsewhere](https://example.org/none.md), `/etc/none.py`, `build/none.py`,
    `make test` and `make nothing`.

        make neither
    """
    assert missing(text, REPOSITORY) == ["docs/none.md", "control/nowhere", "worker.py", "bench/none.json"]
    assert unknown_targets(text.replace("\n    ", "\n")) == ["nothing", "neither"]
