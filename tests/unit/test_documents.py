"""Reading documents: the traps of YAML, what is refused in one line, positions."""

from __future__ import annotations

import codecs
import math
from typing import Any

import pytest

from proxyd.sources.text import documents, yaml_positions, yaml_reader
from proxyd.sources.text.documents import Document, Unreadable, read_documents


def values(text: str | bytes, *, is_json: bool = False) -> list[Any]:
    data = text.encode() if isinstance(text, str) else text
    read = []
    for document in read_documents(data, is_json=is_json):
        assert isinstance(document, Document), document
        read.append(document.value)
    return read


def told(text: str | bytes, *, is_json: bool = False) -> list[str]:
    """What is said of the documents that cannot be read: line:column: message."""
    data = text.encode() if isinstance(text, str) else text
    return [
        f"{document.line}:{document.column}: {document.message}"
        for document in read_documents(data, is_json=is_json)
        if isinstance(document, Unreadable)
    ]


SCALARS: list[tuple[str, Any]] = [
    # What YAML 1.1 takes for something else.
    ("22:22", "22:22"),
    ("1:30:00", "1:30:00"),
    ("on", "on"),
    ("off", "off"),
    ("yes", "yes"),
    ("No", "No"),
    ("y", "y"),
    ("2024-01-01", "2024-01-01"),
    ("2024-01-01T10:00:00Z", "2024-01-01T10:00:00Z"),
    ("017", 17),
    ("08", 8),
    ("1_000", "1_000"),
    ("0b11", "0b11"),
    ("=", "="),
    ("1e3", 1000.0),
    # The core schema of YAML 1.2.
    ("0o17", 15),
    ("0x1F", 31),
    ("-0x1F", "-0x1F"),
    ("+12", 12),
    ("-12", -12),
    ("1.10", 1.1),
    (".5", 0.5),
    ("1.", 1.0),
    ("1.2.3.4", "1.2.3.4"),
    ("10.0.0.0/8", "10.0.0.0/8"),
    ("::1", "::1"),
    ("-", [None]),
    ("-a", "-a"),
    (".", "."),
    ("true", True),
    ("False", False),
    ("tRue", "tRue"),
    ("null", None),
    ("~", None),
    ("", None),
    ("None", "None"),
    (".inf", math.inf),
    ("-.INF", -math.inf),
    ("1" * 41, "1" * 41),
    # Quotes and explicit tags.
    ('"80"', "80"),
    ("'true'", "true"),
    ('""', ""),
    ("!!str 80", "80"),
    ("!!str", ""),
    ("! 80", "80"),
    ('!!int "80"', 80),
    ("!!float 1", 1.0),
    ('!!null ""', None),
    ("!!map {a: 1}", {"a": 1}),
    ("!!seq [1]", [1]),
    ("|\n  a\n  b\n", "a\nb\n"),
    (">\n  a\n  b\n", "a b\n"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalar(text: str, value: Any) -> None:
    (read,) = values(f"key: {text}" if text != "-" else "key:\n-")
    assert read == {"key": value}
    assert type(read["key"]) is type(value)


def test_nan_is_a_float() -> None:
    assert math.isnan(values("[.nan]")[0][0])


def test_on_and_yes_are_keys_like_any_other() -> None:
    assert values("on: 1\nyes: 2\ny: 3\n22:22: 4") == [{"on": 1, "yes": 2, "y": 3, "22:22": 4}]


def test_keys_of_other_types_become_their_text() -> None:
    text = "9000: a\n-1: b\ntrue: c\nFalse: d\n0x1F: e\n1.5: f\nx: &one 1\n*one : g\n"
    assert values(text) == [
        {"9000": "a", "-1": "b", "true": "c", "false": "d", "31": "e", "1.5": "f", "x": 1, "1": "g"}
    ]
    (document,) = read_documents(b"9000: {a: 1}\n")
    assert isinstance(document, Document)
    assert document.positions([("9000", "a")]) == [(1, 11)]


REFUSED: list[tuple[str, str]] = [
    ("a: 1\nb: 2\na: 3\n", '3:1: the key "a" is given twice in this map'),
    ("x:\n  - {k: 1, 'k': 2}\n", '2:12: the key "k" is given twice in this map'),
    ('80: a\n"80": b\n', '2:1: the key "80" is given twice in this map'),
    ("a: {true: a, True: b}\n", '1:14: the key "true" is given twice in this map'),
    ("a: {~: 1}\n", "1:5: a map key must be a string, got null: put it in quotes"),
    ("a: {: 1}\n", "1:5: not valid YAML: did not find expected node content (while parsing a flow node from line 1)"),
    ("? [a]\n: b\n", "1:3: a map key must be a string, got a list"),
    ("port: {{ .Values.port }}\n", "1:8: a map key must be a string, got a map: render templates first"),
    ("x: &a [1]\n*a : 2\n", "2:1: a map key must be a string, got a list"),
    ("a: !!binary aGk=\n", '1:4: !!binary "aGk=" is not a core value of YAML'),
    ("a: !!timestamp 2024-01-01\n", '1:4: !!timestamp "2024-01-01" is not a core value of YAML'),
    ("a: !!python/object:os.system x\n", '1:4: !!python/object:os.system "x" is not a core value of YAML'),
    ("a: !!int eighty\n", '1:4: !!int "eighty" is not a core value of YAML'),
    ("a: !!set {b}\n", "1:4: the tag !!set is not one for a map"),
    ("a: !Ref b\n", '1:4: !Ref "b" is not a core value of YAML'),
    ("a: !mine [b]\n", "1:4: the tag !mine is not one for a list"),
    ("a: &x {b: *x}\n", "1:11: the alias *x is inside of what it stands for"),
    ("a: *x\n", "1:4: the alias *x stands for nothing: there is no &x before it"),
    ("a: {<<: 1}\n", "1:9: the value of << must be a map or a list of maps"),
    ("a: {<<: [{}, b]}\n", "1:15: the value of << must be a map or a list of maps"),
    ("x: &x {}\na:\n  <<: *x\n  <<: *x\n", "4:3: the key << is given twice in this map: merge a list"),
    ("[" * 101 + "]" * 101, "1:101: nested more than 100 levels deep"),
    ("a:\n\t- b\n", "2:1: not valid YAML: a tab may not indent: use spaces"),
    ("a: 'b\n", "2:1: not valid YAML: found unexpected end of stream (while scanning a quoted scalar from line 1)"),
    ("a: [1, 2\n", "2:1: not valid YAML: did not find expected ',' or ']' (while parsing a flow sequence from line 1)"),
    ("a: b: c\n", "1:5: not valid YAML: mapping values are not allowed in this context"),
    ("a: 1\n b: 2\n", "2:3: not valid YAML: mapping values are not allowed in this context"),
    ("a: @b\n", "1:4: not valid YAML: found character that cannot start any token (while scanning for the next token from line 1)"),
    ("a: 1\n%\n", "2:2: not valid YAML: could not find expected directive name (while scanning a directive from line 2)"),
    ("a: 1\nb: \x07\n", "2:4: not valid YAML: the character U+0007 is not allowed here"),
    ("a: 1\n\x85--- b\n", "3:1: a second document starts here without a line of its own"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line"), REFUSED)
def test_refused_in_one_line(text: str, line: str) -> None:
    assert told(text) == [line]


BYTES: list[tuple[bytes, str]] = [
    (b"a: 1\nb: \xff\n", "2:4: not valid UTF-8 (byte 0xff): save the file as UTF-8"),
    (codecs.BOM_UTF8 + "é: ".encode() + b"\xc3", "1:4: not valid UTF-8 (byte 0xc3): save the file as UTF-8"),
    (b"\x7fELF\0\0\0", "0:0: the file is not text: it has NUL bytes"),
    (codecs.BOM_UTF16_LE + b"\x00\xd8", "0:0: not valid UTF-16: save the file as UTF-8"),
]


@pytest.mark.parametrize(("data", "line"), BYTES)
def test_what_is_not_text(data: bytes, line: str) -> None:
    assert told(data) == [line]


def test_a_file_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_BYTES", 1 << 20)
    assert told(b"#" * ((1 << 20) + 1)) == ["0:0: the file has more than 1 MiB: split it"]
    assert told(b"#" * (1 << 20)) == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(encoding: str, newline: str) -> None:
    text = newline.join(["a: é", "---", "b: |", "  x", "  y", "c: 1", "c: 2", "--- ", "d: 1"])
    read = list(read_documents(text.encode(encoding)))
    assert isinstance(read[0], Document)
    assert read[0].value == {"a": "é"}
    assert isinstance(read[1], Unreadable)
    assert (read[1].line, read[1].column) == (7, 1)
    assert isinstance(read[2], Document)
    assert read[2].value == {"d": 1}
    assert read[2].positions([("d",)]) == [(9, 4)]


NOTHING = [
    "",
    "\n",
    "# only this\n",
    "---\n",
    "---\n---\n",
    "--- # a\n# b\n...\n",
    "~\n",
    "%YAML 1.2\n---\n",
    "  \n\t\n",
]


@pytest.mark.parametrize("text", NOTHING)
def test_empty_documents_are_nothing(text: str) -> None:
    assert list(read_documents(text.encode())) == []


def test_documents_are_split_at_markers_only() -> None:
    text = (
        "%YAML 1.2\n# first\n---\na: 1\n--- {b: 2}\n---\nc: |\n  ---\n  x\n...\n# between\n%YAML 1.2\n---\n"
        "d: ----\n---e: 5\n...\nf: 6\n"
    )
    assert values(text) == [{"a": 1}, {"b": 2}, {"c": "---\nx\n"}, {"d": "----", "---e": 5}, {"f": 6}]


def test_an_error_loses_its_own_document_only() -> None:
    text = "a: 1\n---\nb: [\n---\nc: 'x\n---\nd: 4\n---\ne: *gone\n---\nf: 6\nf: 7\n"
    read = list(read_documents(text.encode()))
    assert [document.value for document in read if isinstance(document, Document)] == [{"a": 1}, {"d": 4}]
    assert [document.line for document in read if isinstance(document, Unreadable)] == [4, 6, 9, 12]


def test_anchors_belong_to_one_document() -> None:
    assert told("a: &x 1\n---\nb: *x\n") == ["3:4: the alias *x stands for nothing: there is no &x before it"]


def test_aliases() -> None:
    assert values("a: &x {k: [1]}\nb: *x\nc: &x 2\nd: [*x, *x]\n&n e: *n\n") == [
        {"a": {"k": [1]}, "b": {"k": [1]}, "c": 2, "d": [2, 2], "e": "e"}
    ]


def test_merge_keys() -> None:
    text = """
base: &base {name: a, port: 1}
more: &more {port: 2, protocol: UDP}
one: {<<: *base, port: 9}
two: {port: 9, <<: *base}
list: {<<: [*base, *more]}
inline: {<<: {x: 1}}
quoted: {"<<": 1}
value: <<
chain: &chain {<<: *base, z: 1}
end: {<<: *chain}
"""
    (read,) = values(text)
    assert read["one"] == read["two"] == {"name": "a", "port": 9}
    assert read["list"] == {"name": "a", "port": 1, "protocol": "UDP"}
    assert read["inline"] == {"x": 1}
    assert read["quoted"] == {"<<": 1}
    assert read["value"] == "<<"
    assert read["end"] == {"name": "a", "port": 1, "z": 1}
    assert read["base"] == {"name": "a", "port": 1}


@pytest.mark.parametrize("flavour", ["lists", "merges"])
def test_a_billion_laughs_are_refused(flavour: str) -> None:
    rows = ["a0: &a0 {k: lol}"]
    for i in range(1, 20):
        again = ", ".join([f"*a{i - 1}"] * 9)
        rows.append(
            f"a{i}: &a{i} [{again}]"
            if flavour == "lists"
            else f"a{i}: &a{i} {{<<: [{again}], k{i}: [{again}]}}"
        )
    (line,) = told("\n".join(rows))
    assert line.endswith("its aliases stand for more than 100000 values")


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, "{a: " * 50_000, "- " * 50_000 + "a", "".join(" " * i + "a:\n" for i in range(500))],
)
def test_depth_is_bounded(text: str) -> None:
    (line,) = told(text)
    assert "nested more than 100 levels deep" in line


def test_a_hundred_levels_are_read_and_located() -> None:
    (document,) = read_documents(("[" * 100 + "x" + "]" * 100).encode())
    assert isinstance(document, Document)
    assert document.positions([(0,) * 100]) == [(1, 101)]


POSITIONED = """\
# a comment
kind: Service
spec: &spec
  ports:
    - name: http
      port: eighty
    - {name: é, port: 81}
  empty:
again: *spec
merged:
  <<: *spec
  other: 1
"""


@pytest.mark.parametrize(
    ("path", "position"),
    [
        ((), (4, 1)),
        (("kind",), (4, 7)),
        (("spec",), (5, 7)),
        (("spec", "ports", 0, "port"), (8, 13)),
        (("spec", "ports", 1), (9, 7)),
        (("spec", "ports", 1, "port"), (9, 23)),
        # What is not there is at the nearest value above it.
        (("spec", "ports", 0, "nodePort"), (7, 7)),
        (("spec", "ports", 7), (7, 5)),
        (("spec", "ports", "port"), (7, 5)),
        (("metadata", "name"), (4, 1)),
        # What came by an alias or a merge is where it is written.
        (("again", "ports", 0, "port"), (8, 13)),
        (("merged", "ports", 0, "port"), (8, 13)),
        (("merged", "other"), (14, 10)),
    ],
)
def test_position_in_yaml(path: tuple[str | int, ...], position: tuple[int, int]) -> None:
    first, second = read_documents(("a: 1\n---\n" + POSITIONED).encode())
    assert isinstance(first, Document)
    assert first.positions([("a",)]) == [(1, 4)]
    assert isinstance(second, Document)
    assert second.positions([path]) == [position]


@pytest.mark.parametrize(
    ("path", "position"),
    [
        ((), (4, 1)),
        (("kind",), (4, 7)),
        (("spec",), (5, 7)),
        (("spec", "ports", 0, "port"), (8, 13)),
        (("spec", "ports", 1, "port"), (9, 23)),
        (("spec", "ports", 0, "nodePort"), (7, 7)),
        (("spec", "ports", 7), (7, 5)),
        (("metadata", "name"), (4, 1)),
        (("merged", "other"), (14, 10)),
        # What came by an alias or a merge is at the value that has it.
        (("again", "ports", 0, "port"), (11, 8)),
        (("merged", "ports", 0, "port"), (13, 3)),
    ],
)
def test_position_in_a_large_document(
    path: tuple[str | int, ...], position: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yaml_positions, "_LARGE", 0)
    _, document = read_documents(("a: 1\n---\n" + POSITIONED).encode())
    assert isinstance(document, Document)
    assert document.positions([path, ("kind",)]) == [position, (4, 7)]


def test_values_and_documents_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_reader, "MAX_VALUES", 1000)
    monkeypatch.setattr(documents, "MAX_DOCUMENTS", 10)
    assert told("x:\n" + "- a\n" * 2000) == ["999:3: a document of more than 1000 values: split it"]
    assert told("".join(f"k{n}: v\n" for n in range(2000))) == [
        "500:7: a document of more than 1000 values: split it"
    ]
    assert told("---\na: 1\n" * 12) == ["21:1: more than 10 documents: split the file"]
    assert told("- &a " + "[" + "x," * 90 + "]\n" + "- *a\n" * 100) == []


def test_json() -> None:
    text = '{"a": [1, 2.5, "x", true, null, "\\ud83d\\ude00"]}\n\n{"b": {}} [] "on"'
    assert values(text, is_json=True) == [{"a": [1, 2.5, "x", True, None, "\U0001f600"]}, {"b": {}}, [], "on"]
    assert values("", is_json=True) == values(" \n\t", is_json=True) == []
    assert values(codecs.BOM_UTF8 + b"{}", is_json=True) == [{}]


BAD_JSON: list[tuple[str, str]] = [
    ('{"a": 1,\n "a": 2}', '2:2: the key "a" is given twice in this object'),
    (
        '[{"b": {}, "a": [1, {"b": 0}],\n "x": {"y": 1, "b": {}, "b": ":,"}}',
        '2:25: the key "b" is given twice in this object',
    ),
    ('{"a": 1\n "b": 2}', "2:2: not valid JSON: expecting ',' delimiter"),
    ('{"a": 1,}', "1:9: not valid JSON: expecting property name enclosed in double quotes"),
    ("{a: 1}", "1:2: not valid JSON: expecting property name enclosed in double quotes"),
    ('{"a": NaN}', "1:7: not valid JSON: NaN is no JSON value"),
    ('{"Infinity": [-Infinity]}', "1:15: not valid JSON: -Infinity is no JSON value"),
    ('{"a": "\\ud800"}', "1:1: a text in this value has half of a surrogate pair (\\ud800-\\udfff)"),
    ('{"a": "x\ny"}', "1:9: not valid JSON: invalid control character"),
    ('{"a": 1}}', "1:9: not valid JSON: expecting value"),
    ("[" * 100_000, "1:1: nested too deep"),
    ("apiVersion: v1", "1:1: not valid JSON: expecting value"),
]


@pytest.mark.parametrize(("text", "line"), BAD_JSON)
def test_bad_json(text: str, line: str) -> None:
    assert told(text, is_json=True) == [line]


def test_json_values_before_an_error_are_read() -> None:
    read = list(read_documents(b'{"a": 1}\n{"b": }', is_json=True))
    assert isinstance(read[0], Document)
    assert isinstance(read[1], Unreadable)
    assert (read[1].line, read[1].column) == (2, 7)


@pytest.mark.parametrize(
    ("path", "position"),
    [
        ((), (2, 1)),
        (("items",), (3, 11)),
        (("items", 0, "port"), (4, 14)),
        (("items", 1), (5, 5)),
        (("items", 1, 'a,]}:"b'), (5, 27)),
        (("items", 2, 1), (5, 40)),
        (("items", 3, "x"), (6, 5)),
        (("last",), (7, 12)),
        (("none", 0), (2, 1)),
    ],
)
def test_position_in_json(path: tuple[str | int, ...], position: tuple[int, int]) -> None:
    text = """[0]
{
\t"items": [
    {"port": "eighty"},
    {"a": {}, "a,]}:\\"b": [] }, [ "{", "]"],
    {}],
  "last" : null}"""
    _, document = read_documents(text.encode(), is_json=True)
    assert isinstance(document, Document)
    assert document.positions([path]) == [position]


def test_tabs_and_long_keys_in_json_named_yaml() -> None:
    key = "k" * 500
    assert values(f'{{\n\t"{key}":\t[1,\n\t2]\n}}') == [{key: [1, 2]}]
