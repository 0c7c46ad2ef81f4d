"""How the program's files depend on each other: none needs itself by way of others."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

PACKAGE = REPOSITORY / "proxyd"


def modules(package: Path) -> dict[str, Path]:
    """The files of a package by the name that they are imported by."""
    found = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, files: dict[str, Path]) -> set[str]:
    """The files that a file imports, wherever in it: in a function and for the type checker alone too."""
    own = name.split(".") if files[name].name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(files[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = own[: len(own) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # What is imported from a package may be one of its files, or a name of its own.
            found.update(
                whole if (whole := f"{source}.{alias.name}") in files else source for alias in node.names
            )
    return found & files.keys() - {name}


def circle(package: Path) -> list[str]:
    """The files of one circle of imports, each of which imports the next; [] where there is none."""
    files = modules(package)
    try:
        TopologicalSorter({name: imports(name, files) for name in files}).prepare()
    except CycleError as error:
        return [str(files[name].relative_to(package.parent)) for name in reversed(error.args[1])]
    return []


def test_no_file_needs_itself_by_way_of_others() -> None:
    assert len(modules(PACKAGE)) > 100
    found = circle(PACKAGE)
    assert not found, " -> ".join(found)


def made(folder: Path, texts: dict[str, str]) -> Path:
    """A package `made` of these files."""
    package = folder / "made"
    (package / "sub").mkdir(parents=True)
    for file, text in {"__init__.py": "", "sub/__init__.py": "", **texts}.items():
        (package / file).write_text(text)
    return package


TYPES_ALONE = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import made.a"


@pytest.mark.parametrize(
    ("texts", "files"),
    [
        ({"a.py": "from made import b", "b.py": "from made.a import x"}, ["a.py", "b.py"]),
        ({"a.py": "import made.b", "b.py": "def f():\n    import made.a"}, ["a.py", "b.py"]),
        ({"a.py": "import made.b", "b.py": TYPES_ALONE}, ["a.py", "b.py"]),
        (
            {"a.py": "from .sub import x", "sub/x.py": "from .y import f", "sub/y.py": "from ..a import f"},
            ["a.py", "sub/x.py", "sub/y.py"],
        ),
        ({"a.py": "from made import c, f", "__init__.py": "from made.a import f"}, ["a.py", "__init__.py"]),
    ],
)
def test_a_circle_is_found_and_its_files_are_named_in_order(
    tmp_path: Path, texts: dict[str, str], files: list[str]
) -> None:
    found = circle(made(tmp_path, {"c.py": "import os", **texts, "d.py": "from made import a"}))
    assert found[0] == found[-1]
    start = found.index("made/a.py")
    assert [*found[start:-1], *found[:start]] == [f"made/{file}" for file in files]


def test_files_that_need_the_same_one_are_no_circle(tmp_path: Path) -> None:
    texts = {
        "a.py": "import made.b\nimport made.c",
        "b.py": "from made.c import f",
        "c.py": "import os",
        "sub/x.py": "from made import a",
    }
    assert circle(made(tmp_path, texts)) == []
