"""Whole files: which objects come of them, and every problem with its file, line and column."""

from __future__ import annotations

import json

import pytest

from proxyd.api.decode import Rules
from proxyd.api.meta import ObjectName
from proxyd.sources.manifests.parse import ParsedFile, parse_file
from tests.support.paths import DATA

SEED = DATA / "seed"


def parse(text: str, label: str = "web.yaml") -> ParsedFile:
    return parse_file(label, text.encode(), Rules())


def names(parsed: ParsedFile) -> list[str]:
    return [f"{type(thing).__name__} {thing.metadata.key}" for thing in parsed.objects]


def lines(parsed: ParsedFile) -> list[str]:
    return [str(problem) for problem in parsed.problems]


def service(name: str, port: str = "80") -> str:
    return f"---\napiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  ports:\n    - port: {port}\n"


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("external-database.yaml", ["Service default/my-service", "Endpoints default/my-service"]),
        ("my-service.yaml", ["Service default/my-service"]),
        ("external-name.yaml", ["Service prod/my-service"]),
        ("external-ip.yaml", ["Service default/my-service"]),
        ("my-nodeport-service.yaml", ["Service default/my-nodeport-service"]),
    ],
)
def test_seed_manifests_load_without_a_word(file: str, expected: list[str]) -> None:
    parsed = parse_file(file, (SEED / file).read_bytes(), Rules())
    assert names(parsed) == expected
    assert (parsed.problems, parsed.rejected, parsed.complete) == ((), (), True)


def test_one_bad_object_leaves_the_others() -> None:
    parsed = parse(service("a") + service("b", "eighty") + service("c"))
    assert names(parsed) == ["Service default/a", "Service default/c"]
    assert lines(parsed) == [
        'web.yaml:16:13: error: Service default/b: spec.ports[0].port: expected an integer, got "eighty"'
    ]
    assert parsed.rejected == (("Service", ObjectName("default", "b")),)
    assert parsed.complete


def test_what_cannot_be_read_makes_a_file_incomplete() -> None:
    parsed = parse(service("a") + "---\nkind: [\n" + service("c"))
    assert names(parsed) == ["Service default/a", "Service default/c"]
    assert lines(parsed) == [
        "web.yaml:11:1: error: not valid YAML: did not find expected node content (while parsing a flow node from line 11)"
    ]
    assert not parsed.complete


def test_an_object_without_a_name_makes_a_file_incomplete() -> None:
    parsed = parse(service("a") + service('""'))
    assert lines(parsed) == ["web.yaml:13:9: error: Service: metadata.name: required"]
    assert (parsed.rejected, parsed.complete) == ((), False)


def test_problems_of_list_items_are_placed_in_yaml() -> None:
    parsed = parse(
        """\
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Service
  metadata: {name: a}
  spec:
    type: NodePort
    ports:
    - {port: 80, nodePort: 22}
- {apiVersion: apps/v1, kind: Deployment}
"""
    )
    assert lines(parsed) == [
        "web.yaml:10:28: error: Service default/a: spec.ports[0].nodePort: 22 is not in the range 30000-32767 (--service-node-port-range)",
        "web.yaml:11:31: warning: Deployment: kind Deployment (apps/v1) is not used by proxyd: ignored",
    ]


def test_problems_are_placed_in_json() -> None:
    text = """{"apiVersion": "v1", "kind": "ServiceList", "items": [
  {"metadata": {"name": "a"}, "spec": {"ports": [{"port": 80}, {"port": 81}]}}
]}
{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}"""
    parsed = parse(text, "all.JSON")
    assert names(parsed) == ["Pod default/p"]
    assert lines(parsed) == [
        "all.JSON:2:50: error: Service default/a: spec.ports[0].name: required: each of several ports has a name",
        "all.JSON:2:64: error: Service default/a: spec.ports[1].name: required: each of several ports has a name",
    ]


@pytest.mark.parametrize("first", ["80", "eighty"])
def test_the_second_of_the_same_object_is_an_error(first: str) -> None:
    parsed = parse(service("a", first) + service("a", "81") + service("b"))
    assert "web.yaml:10:1: error: Service default/a: is in this file already, at line 2" in lines(parsed)
    # If the first is bad, the second does not slip into its place.
    assert names(parsed) == (["Service default/a"] if first == "80" else []) + ["Service default/b"]
    assert parsed.rejected == (() if first == "80" else (("Service", ObjectName("default", "a")),))


def test_a_bad_second_does_not_reject_the_good_first() -> None:
    parsed = parse(service("a") + service("a", "eighty"))
    assert names(parsed) == ["Service default/a"]
    assert parsed.rejected == ()
    assert lines(parsed) == [
        'web.yaml:16:13: error: Service default/a: spec.ports[0].port: expected an integer, got "eighty"'
    ]


def test_the_same_name_in_another_kind_or_namespace_is_another_object() -> None:
    other = service("a").replace("name: a", "name: a\n  namespace: prod")
    pod = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: a}\n"
    parsed = parse(service("a") + other + pod)
    assert names(parsed) == ["Service default/a", "Service prod/a", "Pod default/a"]
    assert parsed.problems == ()


def test_the_same_object_twice_in_one_list() -> None:
    item = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "a"},
        "spec": {"ports": [{"port": 1}]},
    }
    parsed = parse(
        json.dumps({"apiVersion": "v1", "kind": "List", "items": [item, item]}, indent=1), "a.json"
    )
    assert names(parsed) == ["Service default/a"]
    assert lines(parsed) == ["a.json:19:3: error: Service default/a: is in this file already, at line 5"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n---\n"])
def test_a_file_with_nothing_in_it(text: str) -> None:
    assert parse(text) == ParsedFile()


def test_a_file_that_is_not_text() -> None:
    parsed = parse_file("x.yaml", b"\x7fELF\0", Rules())
    assert lines(parsed) == ["x.yaml: error: the file is not text: it has NUL bytes"]
    assert not parsed.complete


def test_problems_come_in_the_order_of_the_file() -> None:
    parsed = parse("".join(service(f"s{i}", "x") for i in range(12)))
    assert [problem.line for problem in parsed.problems] == [8 * i + 8 for i in range(12)]


def test_labels_that_yaml_1_1_would_break() -> None:
    parsed = parse(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: on\n  creationTimestamp: 2024-01-01T00:00:00Z\n"
        "  labels: {on: yes, time: 22:22}\nspec:\n  selector: {on: off}\n  ports: [{port: 0080}]\n"
    )
    assert lines(parsed) == []
    (thing,) = parsed.objects
    assert thing.metadata.labels == {"on": "yes", "time": "22:22"}
    assert thing.metadata.creation_timestamp == "2024-01-01T00:00:00Z"
