"""The quick reader of plain YAML says what the full one says, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxyd.sources.text import yaml_plain
from proxyd.sources.text.yaml_reader import Unreadable, read_fully
from tests.support.paths import REPOSITORY

KEYS = ["a", "b", "c-d", "x.y/z", "true", "null", "n", "on", "0", "~", "a b", '"q"', "<<", "é", "_"]
VALUES = [
    *(
        "",
        "1",
        "-1",
        "+1",
        "0x1f",
        "017",
        "1e3",
        ".5",
        ".inf",
        "1.2.3.4",
        "22:22",
        "a:b",
        "a:",
        "a: b",
        "a :b",
    ),
    *(
        "~",
        "null",
        "true",
        "True",
        "yes",
        "word",
        "two words",
        "w  x",
        "a #b",
        "a#b",
        "#c",
        "# c",
        "a - b",
        "-",
        "- a",
    ),
    *(
        '"text"',
        '"a: b"',
        '"a\\n"',
        '""',
        "'x'",
        "'it''s'",
        '"',
        '"a" b',
        '"a"b',
        "{}",
        "[]",
        "{a: 1}",
        "[1]",
    ),
    *(
        "{",
        "&x y",
        "*x",
        "!!str 1",
        "|",
        ">",
        "%a",
        "@a",
        "`a",
        "?",
        "? a",
        ":",
        "(a)",
        "/a",
        "é",
        "\ta",
        "a\tb",
    ),
    *(
        "=",
        "a=b",
        "a,b",
        "a]",
        "[a",
        "a}",
        "---",
        "...",
        "--- a",
        "2024-01-01",
        "a'b",
        'a"b',
        "<a",
        "a\\b",
        "=a",
    ),
]


@st.composite
def lines(draw: st.DrawFn) -> str:
    indent = " " * draw(st.sampled_from([0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 6]))
    kind = draw(st.sampled_from(["key", "key", "key", "item", "item key", "value", "odd"]))
    key = draw(st.sampled_from(KEYS[:3] if draw(st.integers(0, 4)) else KEYS))
    value = draw(st.sampled_from(["", "", "1", "word", *VALUES]))
    dash = draw(st.sampled_from(["- ", "- ", "-  ", "-"]))
    tail = draw(st.sampled_from(["", "", "", "", " ", "  ", " # note", "#", "\t"]))
    space = draw(st.sampled_from([" ", " ", " ", "  ", "", "\t"])) if value else ""
    match kind:
        case "key":
            return f"{indent}{key}:{space}{value}{tail}"
        case "item":
            return f"{indent}{dash}{value}{tail}"
        case "item key":
            return f"{indent}{dash}{key}:{space}{value}{tail}"
        case "value":
            return f"{indent}{value}{tail}"
    return draw(
        st.sampled_from(["", " ", "  # note", "#", "---", "- - a", "%YAML 1.2", "a: b: c", "\t", "\x01"])
    )


def same(quick: object, full: object) -> bool:
    """Equal, and of the same types all through."""
    return repr(quick) == repr(full)


@settings(max_examples=400, deadline=None)
@given(st.lists(lines(), max_size=9).map("\n".join))
@example("---\na:\n- b: 1\n  c:\n  - d\n  - e: {}\nf: []\n")
@example("a: b\n  c: d\n")
@example("a:\n  - b\n  c: d\n")
@example("a:\n- b\n - c\n")
@example("  a: 1\n b: 2\n")
@example("a: 1\n- b\n")
def test_it_reads_as_the_full_reader_does(text: str) -> None:
    quick = yaml_plain.read(text)
    if quick is None:
        return
    try:
        full = read_fully(text, 0)
    except Unreadable as error:
        pytest.fail(f"read {text!r} as {quick!r}: {error.message}")
    assert same(quick, full), text


PLAIN = st.one_of(
    st.recursive(
        st.sampled_from(["1", "word", "two words", "10.0.0.1", '"a: b"', "'x'", "{}", "[]", "null", "22:22"]),
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.dictionaries(st.sampled_from(["a", "b-c", "d.e/f"]), inner, min_size=1, max_size=3),
        ),
        max_leaves=8,
    )
)


def written(value: object, indent: int, step: int) -> list[str]:
    """A value in the plain form, lists in lists aside."""
    room = " " * indent
    if isinstance(value, dict):
        out = []
        for key, inner in value.items():
            if isinstance(inner, str):
                out.append(f"{room}{key}: {inner}")
            else:
                deeper = indent + step if isinstance(inner, dict) or step > 2 else indent
                out += [f"{room}{key}:", *written(inner, deeper, step)]
        return out
    assert isinstance(value, list)
    out = []
    for inner in value:
        if isinstance(inner, str):
            out.append(f"{room}- {inner}")
        elif isinstance(inner, dict):
            first, *rest = written(inner, indent + 2, step)
            out += [f"{room}- {first.lstrip()}", *rest]
    return out or [f"{room}- x"]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "kind"]), PLAIN, min_size=1), st.sampled_from([1, 2, 4]))
def test_plain_documents_are_read(value: dict[str, object], step: int) -> None:
    text = "\n".join(["---", *written(value, 0, step), ""])
    quick = yaml_plain.read(text)
    assert quick is not None, text
    assert same(quick, read_fully(text, 0)), text


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("config/**/*.yaml")), ids=str)
def test_the_demo_is_read_the_same(path: Path) -> None:
    text = path.read_text().split("\n---")[0]
    quick = yaml_plain.read(text)
    assert quick is None or same(quick, read_fully(text, 0))


def test_nothing_is_shared_between_documents() -> None:
    first, second = yaml_plain.read("a: {}\nb: []\n"), yaml_plain.read("a: {}\nb: []\n")
    assert first == second == {"a": {}, "b": []}
    assert first is not None
    assert second is not None
    assert first["a"] is not second["a"]
    assert first["b"] is not second["b"]
