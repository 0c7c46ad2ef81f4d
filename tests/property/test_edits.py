"""An edited large file is read in parts; what comes out is what reading all of it gives."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from proxyd.api.rules import Rules
from proxyd.sources.manifests.parse import ParsedFile, parse_file

RULES = Rules()
COUNT = 300
DOCUMENT = """\
---
# A comment that makes the file large enough for what its documents hold to be remembered.
apiVersion: v1
kind: Service
metadata:
  name: svc-{number}
  labels:
    made-for: large-files-are-read-in-parts
spec:
  clusterIP: 10.96.{high}.{low}
  ports:
    - port: {port}
"""
FRAGMENTS = (
    "", "\n", "---\n", "\n---\n", "...\n", "\n...\n", "---", "--", "-", " ", "#", "a", "0", "\n---\n---\n", "\n--- # x\n", "\r\n",
    "%YAML 1.2\n", "kind: Service\n", "\n---\napiVersion: v1\nkind: Service\nmetadata: {name: more}\nspec: {ports: [{port: 1}]}\n",
)  # fmt: skip


def document(number: int, port: int = 80) -> str:
    return DOCUMENT.format(number=number, high=number // 200, low=number % 200 + 1, port=port)


BASE = "".join(map(document, range(COUNT)))
PLACES = st.one_of(
    st.integers(0, len(BASE)),
    # At and near the beginning of a document.
    st.builds(
        lambda number, by: max(0, BASE.index(document(number)) + by),
        st.integers(0, COUNT - 1),
        st.integers(-6, 6),
    ),
    st.integers(len(BASE) - 8, len(BASE)),
)
CUTS = st.tuples(PLACES, st.sampled_from((0, 0, 1, 3, 4, 5, 40)), st.sampled_from(FRAGMENTS))
WHOLE = st.tuples(
    st.sampled_from(("change", "remove", "double", "insert", "swap")),
    st.integers(0, COUNT - 1),
    st.sampled_from((80, 81, 99999)),
)


def edited(text: str, edit: tuple[object, ...]) -> str:
    match edit:
        case (int() as place, int() as length, str() as fragment):
            return text[:place] + fragment + text[place + length :]
        case ("change", int() as number, int() as port):
            return text.replace(document(number), document(number, port))
        case ("remove", int() as number, _):
            return text.replace(document(number), "")
        case ("double", int() as number, _):
            return text.replace(document(number), document(number) * 2)
        case ("insert", int() as number, int() as port):
            return text.replace(document(number), document(number) + document(1000 + number, port))
        case ("swap", int() as number, _):
            return text.replace(document(number), "").replace(document(0), document(0) + document(number), 1)
    raise AssertionError(edit)


def said(parsed: ParsedFile) -> tuple[object, ...]:
    return parsed.objects, parsed.problems, parsed.rejected, parsed.complete


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(CUTS, WHOLE), min_size=1, max_size=3))
def test_reading_what_differs_says_what_reading_all_says(edits: list[tuple[object, ...]]) -> None:
    text = BASE
    parsed = first()
    for edit in edits:
        text = edited(text, edit)
        data = text.encode()
        parsed = parse_file("all.yaml", data, RULES, parsed.known, parsed.layout)
        whole = parse_file("all.yaml", data, RULES)
        assert said(parsed) == said(whole)
        # What is remembered is what the file has, and no more.
        assert parsed.known.keys() == whole.known.keys()


def test_a_change_of_one_document_reads_that_one() -> None:
    before = first()
    after = parse_file(
        "all.yaml",
        BASE.replace(document(150), document(150, 81)).encode(),
        RULES,
        before.known,
        before.layout,
    )
    assert after.swapped is not None
    old, new = after.swapped
    assert [thing.metadata.name for thing in (*old, *new)] == ["svc-150", "svc-150"]
    same = [one is other for one, other in zip(before.objects, after.objects, strict=True)]
    assert same.count(False) == 1


_FIRST: list[ParsedFile] = []


def first() -> ParsedFile:
    """The file before any edit; read once."""
    if not _FIRST:
        _FIRST.append(parse_file("all.yaml", BASE.encode(), RULES))
    return _FIRST[0]
