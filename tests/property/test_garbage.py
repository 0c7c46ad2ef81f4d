"""Garbage gives objects or problems, nothing else: no exception, no second line in a message."""

from __future__ import annotations

import copy
import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyd.api.decode import Rules, decode
from proxyd.api.problems import Problem, Severity
from proxyd.sources.manifests.parse import parse_file

MANIFEST = """\
apiVersion: v1
kind: Service
metadata: &m
  name: web
  labels: {a: "b", on: 22:22}
spec:
  type: NodePort
  ports:
    - port: 80
      nodePort: 30080
---
kind: List
apiVersion: v1
items:
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: web-1}
  endpoints: [{addresses: [10.1.2.3]}]
- {apiVersion: v1, kind: Pod, metadata: {name: p}, status: {podIP: 10.1.2.3}}
"""
JSON = '{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "status": {"podIP": "10.1.2.3"}}\n'

WHOLE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "List",
    "items": [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web", "namespace": "prod", "labels": {"a": "b"}},
            "spec": {
                "type": "LoadBalancer",
                "selector": {"app": "web"},
                "clusterIP": "10.0.0.1",
                "clusterIPs": ["10.0.0.1"],
                "ipFamilies": ["IPv4"],
                "externalIPs": ["80.11.12.10"],
                "ports": [{"port": 80, "name": "http", "targetPort": "web", "nodePort": 30080}],
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}},
                "loadBalancerSourceRanges": ["10.0.0.0/8"],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": "1.2.3.4"}]}},
        },
        {
            "apiVersion": "v1",
            "kind": "Endpoints",
            "metadata": {"name": "web"},
            "subsets": [{"addresses": [{"ip": "10.1.2.3"}], "ports": [{"port": 1}]}],
        },
        {
            "apiVersion": "discovery.k8s.io/v1beta1",
            "kind": "EndpointSlice",
            "metadata": {"name": "web-1"},
            "addressType": "IPv4",
            "endpoints": [{"addresses": ["10.1.2.3"], "topology": {"a": "b"}, "conditions": {"ready": True}}],
            "ports": [{"port": 1, "name": "a"}],
        },
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "p"},
            "spec": {"containers": [{"ports": [{"containerPort": 1}]}]},
            "status": {"podIP": "10.1.2.3", "conditions": [{"type": "Ready", "status": "True"}]},
        },
    ],
}

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["None", "127.0.0.1", "::", "v1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in items for place in places(item, (*path, key))]


def check_problems(problems: tuple[Problem, ...]) -> None:
    for problem in problems:
        assert problem.message
        assert str(problem).isprintable()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["a.yaml", "a.json"]))
def test_random_bytes(data: bytes, label: str) -> None:
    parsed = parse_file(label, data, Rules())
    assert parsed.objects == ()
    check_problems(parsed.problems)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_text(data: st.DataObject) -> None:
    label, text = data.draw(st.sampled_from([("a.yaml", MANIFEST), ("a.json", JSON * 2)]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 8)))
        junk = st.text(alphabet="{}[]&*!|>'\"%@`,:?-#~<\n\t .\\/0129abu\x85\u2028\ufeffé", max_size=6)
        text = text[:start] + data.draw(junk | st.text(max_size=3)) + text[end:]
    parsed = parse_file(label, text.encode(), Rules())
    check_problems(parsed.problems)
    last = (
        text.count("\n") + text.count("\r") + text.count("\x85") + text.count("\u2028") + text.count("\u2029")
    )
    for problem in parsed.problems:
        assert problem.file == label
        if "\0" in text:  # not a text: no line of it is meant
            assert (problem.line, problem.column) == (0, 0)
        else:
            assert 1 <= problem.line <= last + 2
            assert problem.column >= 1


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_objects(data: st.DataObject) -> None:
    raw = copy.deepcopy(WHOLE)
    touched = set()
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.sampled_from(places(raw)))
        touched.add(place[1] if len(place) > 1 else None)
        parent: Any = raw
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = data.draw(values)
        if not places(raw):
            break
    decoded = decode(raw, Rules())
    check_problems(decoded.problems)
    assert len(decoded.problems) == len(decoded.problem_places)
    assert len(decoded.objects) == len(decoded.object_places)
    assert len(decoded.rejected) == len(decoded.rejected_places)
    errors = [problem for problem in decoded.problems if problem.severity is Severity.ERROR]
    assert bool(errors) >= bool(decoded.rejected)
    # What is served can be written down; what was not touched is served.
    msgspec.json.encode(decoded.objects)
    if None not in touched:
        untouched = {("items", i) for i in range(len(WHOLE["items"]))} - {("items", i) for i in touched}
        assert untouched <= set(decoded.object_places)
    # The same document as text says the same.
    if (
        not decoded.complete
        or "NaN" in (text := json.dumps(raw))
        or "Infinity" in text
        or "\\ud" in text.lower()
    ):
        return
    as_json = parse_file("a.json", text.encode(), Rules())
    assert len(as_json.objects) == len(decoded.objects)


@settings(max_examples=100, deadline=None)
@given(values)
def test_any_value_at_all(raw: object) -> None:
    decoded = decode(raw, Rules())
    assert decoded.objects == ()
    assert len(decoded.problems) >= 1
    check_problems(decoded.problems)
