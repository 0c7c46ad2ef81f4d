"""Assembling one state after another comes to what assembling the last one alone does."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyd.api.discovery import Endpoints, EndpointSlice
from proxyd.api.meta import ObjectName
from proxyd.api.pod import Pod
from proxyd.api.service import Service
from proxyd.sources.manifests.source import ManifestSet
from proxyd.sources.standalone.allocation import Allocations, Settings
from proxyd.sources.standalone.assemble import Assembler, assemble

SETTINGS = Settings(cluster_cidrs=("10.96.0.0/29",), node_port_range=(30000, 30002))
NOW = "2026-01-02T03:04:05.000006Z"
NAMES = ["a", "b", "c"]
KINDS: dict[str, type] = {"services": Service, "endpoints": Endpoints, "slices": EndpointSlice, "pods": Pod}


def build(kind: str, name: str, choice: int) -> Any:
    """One of a few objects of a kind; None for no object."""
    bodies: dict[str, list[dict[str, Any] | None]] = {
        "services": [
            None,
            {"spec": {"ports": [{"port": 80}]}},
            {"spec": {"ports": [{"port": 80}], "type": "NodePort", "selector": {"app": "x"}}},
            {"spec": {"ports": [{"port": 80}], "clusterIP": "10.96.0.2"}},
            {"spec": {"ports": [{"port": 80, "targetPort": "web"}], "selector": {"app": "x"}}},
            {"spec": {"type": "ExternalName", "externalName": "x.y"}},
            {"spec": {"clusterIP": "None", "selector": {"app": "y"}}},
        ],
        "endpoints": [None, {"subsets": [{"addresses": [{"ip": "10.1.1.1"}], "ports": [{"port": 1}]}]}],
        "slices": [
            None,
            {"ports": [{"port": 1}], "endpoints": [{"addresses": ["10.1.1.2"]}]},
            {
                "ports": [{"port": 1}],
                "endpoints": [{"addresses": ["10.1.1.2"], "conditions": {"ready": False}}],
            },
            {"labels": {"kubernetes.io/service-name": "a"}, "endpoints": [{"addresses": ["10.1.1.3"]}]},
        ],
        "pods": [
            None,
            {"labels": {"app": "x"}, "status": {"podIP": "10.2.2.2"}},
            {"labels": {"app": "x"}},
            {"labels": {"app": "y"}, "status": {"podIP": "10.2.2.3"}},
        ],
    }
    options = bodies[kind]
    body = options[choice % len(options)]
    if body is None:
        return None
    labels = body.get("labels", {})
    raw = {"metadata": {"name": name, "labels": labels}, **{k: v for k, v in body.items() if k != "labels"}}
    return msgspec.convert(raw, KINDS[kind])


steps = st.lists(
    st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from(NAMES), st.integers(0, 6)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_what_is_remembered_changes_nothing(changes: list[tuple[str, str, int]]) -> None:
    assembler = Assembler(SETTINGS)
    allocations = Allocations()
    manifests = ManifestSet()
    for kind, name, choice in changes:
        key = ObjectName("default", name)
        objects = dict(getattr(manifests, kind))
        thing = build(kind, name, choice)
        objects.pop(key, None)
        if thing is not None:
            objects[key] = thing
        manifests = msgspec.structs.replace(manifests, **{kind: objects})
        alone = assemble(manifests, allocations, SETTINGS, NOW)
        have = assembler.assemble(manifests, allocations, NOW)
        assert have == alone
        before, allocations = have, have.allocations
        # Nothing changed: the very same comes out, also later.
        assert assembler.assemble(manifests, allocations, "2027-01-01T00:00:00.000000Z") is before


def test_objects_that_did_not_change_come_out_the_same() -> None:
    assembler = Assembler(SETTINGS)
    key, other = ObjectName("default", "a"), ObjectName("default", "b")
    both = {key: build("services", "a", 1), other: build("services", "b", 2)}
    slices = {key: build("slices", "a", 1), other: build("slices", "b", 1)}
    manifests = ManifestSet(services=both, slices=slices)
    first = assembler.assemble(manifests, Allocations(), NOW)
    changed = msgspec.structs.replace(manifests, slices={**slices, key: build("slices", "a", 2)})
    second = assembler.assemble(changed, first.allocations, NOW)
    assert second.allocations is first.allocations
    assert second.snapshot.services is first.snapshot.services
    assert second.snapshot.slices[other] is first.snapshot.slices[other]
    assert second.snapshot.slices[key] != first.snapshot.slices[key]
