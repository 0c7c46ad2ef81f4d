"""The test API server answers as a real one did, and the source understands what a real one said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.api_server import ApiServer
from tests.support.cluster_source import RECORDINGS, follow, recorded, recorded_lines
from tests.support.waiting import eventually

BETA = "/apis/discovery.k8s.io/v1beta1/endpointslices"


async def get(server: ApiServer, path: str, **headers: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(server.url + path, headers=headers) as answer:
        return answer.status, json.loads(await answer.read())


def without_links(thing: Any) -> Any:
    """selfLink is of 1.19 and older."""
    if isinstance(thing, dict):
        return {key: without_links(value) for key, value in thing.items() if key != "selfLink"}
    return [without_links(item) for item in thing] if isinstance(thing, list) else thing


@pytest.mark.parametrize(
    ("recording", "plural", "path"),
    [
        ("list-services.http", "services", "/api/v1/services"),
        ("list-endpoints.http", "endpoints", "/api/v1/endpoints"),
        ("list-endpointslices-v1beta1.http", "endpointslices", BETA),
    ],
)
async def test_lists(server: ApiServer, recording: str, plural: str, path: str) -> None:
    real = recorded(recording)
    server.store.restore(plural, real["items"])
    server.store.rv = int(real["metadata"]["resourceVersion"])
    assert await get(server, path) == (200, without_links(real) | {"items": real["items"]})


async def test_pages(server: ApiServer) -> None:
    server.store.restore("services", recorded("list-services.http")["items"])
    server.store.rv = 260
    token = ""
    for name in ("list-services-page1.http", "list-services-page2.http"):
        real = recorded(name)
        status, page = await get(server, f"/api/v1/services?limit=3{token}")
        assert (status, page["items"]) == (200, real["items"])
        assert page["metadata"] == without_links(real["metadata"])
        token = f"&continue={page['metadata']['continue']}"


async def test_refusals(server: ApiServer) -> None:
    server.tokens = {"good": "somebody", "other": "nobody"}
    server.forbidden = {"nobody"}
    server.versions = {"v1beta1"}
    for name, path, token in (
        ("list-services-401.http", "/api/v1/services", "wrong"),
        ("list-services-403.http", "/api/v1/services", "other"),
        ("list-endpointslices-v1-404.http", "/apis/discovery.k8s.io/v1/endpointslices", "good"),
    ):
        real = recorded(name)
        assert await get(server, path, Authorization=f"Bearer {token}") == (real["code"], real)


async def test_watch_from_a_forgotten_version(server: ApiServer) -> None:
    server.store.rv = 259
    server.store.compact()
    server.store.compacted = server.store.rv = 260
    status, event = await get(server, "/api/v1/services?watch=1&resourceVersion=1")
    assert (status, event) == (200, recorded("watch-services-410.http"))


async def test_watch_of_recorded_changes(server: ApiServer) -> None:
    """The same kinds of events for the same changes: leaving the selector, coming back, deletion, bookmark."""
    server.bookmark_seconds = 1
    for body in recorded("list-services.http")["items"]:
        if body["metadata"]["name"] in ("web", "external-db"):
            body["metadata"]["labels"] = {}
            server.store.restore("services", [body])
    store, rv = server.store, server.store.rv
    store.patch(
        "services",
        ("default", "web"),
        {"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "o"}}},
    )
    store.patch(
        "services",
        ("default", "web"),
        {"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": None}}},
    )
    store.patch("services", ("default", "web"), {"spec": {"sessionAffinity": "ClientIP"}})
    store.delete("services", ("default", "web"))
    selector = "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless"
    query = {
        "watch": "1",
        "resourceVersion": str(rv),
        "labelSelector": selector,
        "allowWatchBookmarks": "true",
        "timeoutSeconds": "2",
    }
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{server.url}/api/v1/services", params=query) as answer,
    ):
        events = [json.loads(line) for line in (await answer.read()).splitlines()]
    kinds = [event["type"] for event in events]
    assert kinds[:4] == ["DELETED", "ADDED", "MODIFIED", "DELETED"]
    versions = [int(event["object"]["metadata"]["resourceVersion"]) for event in events]
    assert versions[:4] == [rv + 1, rv + 2, rv + 3, rv + 4]
    real = [json.loads(line) for line in recorded_lines("watch-services.jsonl")]
    bookmark, real_bookmark = events[-1], real[-1]
    for one in (bookmark, real_bookmark):
        del one["object"]["metadata"]["resourceVersion"]
    assert bookmark == real_bookmark
    assert {tuple(event) for event in events} == {tuple(event) for event in real}


@pytest.mark.parametrize("api", ["v1beta1", "endpoints"])
async def test_the_source_follows_recorded_watches(server: ApiServer, tmp_path: Path, api: str) -> None:
    server.versions = {"v1beta1"} if api == "v1beta1" else set()
    async with follow(server, tmp_path) as seen:
        await eventually(lambda: len(server.watches) == 3)
        server.order(b"".join(recorded_lines("watch-services.jsonl")), "services")
        backends = "endpointslices" if api == "v1beta1" else "endpoints"
        name = "watch-endpointslices-v1beta1.jsonl" if api == "v1beta1" else "watch-endpoints.jsonl"
        server.order(b"".join(recorded_lines(name)), backends)
        await eventually(lambda: "default/web" in seen.services() and seen.endpoints("web"))
        names = ["kubernetes", "web", "np", "lb", "ext", "headless", "dns", "diameter"]
        await eventually(lambda: seen.services() == {f"default/{name}" for name in names})
        last = {}
        for line in recorded_lines("watch-services.jsonl"):
            event = json.loads(line)
            last[event["object"]["metadata"].get("name")] = event["object"]
        np = next(service for name, service in seen.state.services.items() if name.name == "np")
        timeout = last["np"]["spec"]["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"]
        assert np.spec.affinity_seconds == timeout
        # The pods of the recording, as both APIs tell of them; hand-written ones are gone.
        assert seen.endpoints("kubernetes") == {"172.31.0.1"}
        await eventually(lambda: seen.endpoints("web") == {"172.31.0.11", "172.31.0.12"})
        assert seen.endpoints("external-db") == set()
        conditions = {
            endpoint.addresses[0]: endpoint.conditions.ready
            for one in seen.state.slices[np.metadata.key]
            for endpoint in one.endpoints
        }
        nodes = {
            endpoint.node_name for one in seen.state.slices[np.metadata.key] for endpoint in one.endpoints
        }
        assert conditions == {"172.31.0.11": True, "172.31.0.12": False}
        assert nodes == {"node"}
        assert seen.problems == []


async def test_the_recorded_node(server: ApiServer, tmp_path: Path) -> None:
    node = json.loads((RECORDINGS / "get-node.http").read_text().split("\n\n", 1)[1])
    server.store.objects["nodes"].clear()
    server.store.restore("nodes", [node])
    async with follow(server, tmp_path) as seen:
        assert seen.state.node is not None
        assert (seen.state.node.metadata.name, seen.state.node.zone, seen.state.node.eligible) == (
            "node",
            "za",
            True,
        )
        taint = {"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}}
        server.store.patch("nodes", ("", "node"), taint)
        await eventually(lambda: seen.state.node and not seen.state.node.eligible)
        server.store.delete("nodes", ("", "node"))
        await eventually(lambda: seen.state.node is None)
