"""What a source knows, from its first list through changes, relists and versions of the API."""

from __future__ import annotations

import gc
import re
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from proxyd.api.service import Service
from proxyd.sources.cluster import ClusterSource, Tuning, load_access
from proxyd.sources.cluster.steps import Page
from tests.support.api_server import ApiServer
from tests.support.cluster_source import QUICK, endpoints, follow, name_of, service
from tests.support.waiting import eventually

PROXY_NAME = "service.kubernetes.io/service-proxy-name"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"


def asked(server: ApiServer, path: str, **params: str) -> list[dict[str, str]]:
    """The queries of requests for a path, those that have all of `params`."""
    found = []
    for request in server.requests:
        parts = urlsplit(request.partition(" ")[2])
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if parts.path == path and params.items() <= query.items():
            found.append(query)
    return found


async def test_changes_are_followed(server: ApiServer, tmp_path: Path) -> None:
    store = server.store
    store.create("services", service("web"))
    store.create("endpointslices", endpoints("web", "10.1.0.1"))
    async with follow(server, tmp_path) as seen:
        assert seen.source.synced
        assert seen.services() == {"default/web"}
        assert seen.endpoints("web") == {"10.1.0.1"}
        assert seen.state.node is not None
        assert seen.state.node.zone == "za"
        assert seen.source.endpoints_api == "discovery.k8s.io/v1 EndpointSlice"
        web = seen.state.services[name_of("default/web")]
        store.create("services", service("db"))
        await eventually(lambda: "default/db" in seen.services())
        assert seen.state.services[name_of("default/web")] is web, "what did not change is the same object"
        second = endpoints("web", "10.1.0.2")
        second["metadata"]["name"] = "web-zzzzz"
        store.create("endpointslices", second)
        await eventually(lambda: seen.endpoints("web") == {"10.1.0.1", "10.1.0.2"})
        store.delete("endpointslices", ("default", "web-abcde"))
        await eventually(lambda: seen.endpoints("web") == {"10.1.0.2"})
        store.delete("services", ("default", "db"))
        await eventually(lambda: "default/db" not in seen.services())
        assert seen.problems == []


async def test_states_that_were_handed_out_do_not_change(server: ApiServer, tmp_path: Path) -> None:
    async with follow(server, tmp_path) as seen:
        first = seen.state
        server.store.create("services", service("web"))
        await eventually(seen.services)
        assert not first.services
        assert first.slices is seen.state.slices, "a mapping in which nothing changed is the same one"


async def test_a_slice_that_moves_to_another_service(server: ApiServer, tmp_path: Path) -> None:
    server.store.create("endpointslices", endpoints("web", "10.1.0.1"))
    async with follow(server, tmp_path) as seen:
        labels = {"kubernetes.io/service-name": "db"}
        server.store.patch("endpointslices", ("default", "web-abcde"), {"metadata": {"labels": labels}})
        await eventually(lambda: seen.endpoints("db") == {"10.1.0.1"})
        assert seen.endpoints("web") == set()
        assert list(seen.state.slices) == [name_of("default/db")]


async def test_nothing_is_said_before_everything_is_listed(server: ApiServer, tmp_path: Path) -> None:
    server.store.create("services", service("web"))
    for match in ("/services", "/endpointslices", "/nodes"):
        fault = server.fail(match, status=503, times=-1)
        async with follow(server, tmp_path, sync=False) as seen:
            await eventually(lambda: len(server.watches) == 2)
            server.store.patch("services", ("default", "web"), {"spec": {"sessionAffinity": "ClientIP"}})
            server.store.patch("nodes", ("", "node"), {"metadata": {"labels": {"a": "b"}}})
            await eventually(lambda: seen.said("503 failing as told"))
            assert not seen.source.synced
            assert not seen.states
            server.faults.remove(fault)
            await seen.sync()
            assert seen.source.synced
        server.store.patch("services", ("default", "web"), {"spec": {"sessionAffinity": "None"}})
        await eventually(lambda: not server.watches)


async def test_a_node_that_may_not_be_read_is_not_waited_for(server: ApiServer, tmp_path: Path) -> None:
    server.fail("/nodes", status=403, times=-1)
    async with follow(server, tmp_path) as seen:
        assert seen.state.node is None
        assert seen.said("node: 403 failing as told: give this user the ClusterRole system:node-proxier") == 1


async def test_lists_come_in_pages(server: ApiServer, tmp_path: Path) -> None:
    for i in range(120):
        server.store.create("services", service(f"s{i}"))
    tuning = Tuning(page=50, first_pause=0.05)
    async with follow(server, tmp_path, tuning=tuning) as seen:
        assert len(seen.state.services) == 120
        pages = [query for query in asked(server, "/api/v1/services") if "watch" not in query]
        assert pages[0]["limit"] == "50"
        assert len(pages) > 1
        assert all("continue" in page for page in pages[1:])
        assert int(pages[1]["limit"]) > 50, "small objects: larger pages"


async def test_what_changes_between_pages_and_watch_is_seen(server: ApiServer, tmp_path: Path) -> None:
    for i in range(120):
        server.store.create("services", service(f"s{i}"))
    fault = server.fail("continue=", status=429, retry_after=0, times=1)
    async with follow(server, tmp_path, tuning=Tuning(page=50, first_pause=0.3), sync=False) as seen:
        await eventually(lambda: fault not in server.faults)
        server.store.delete("services", ("default", "s0"))
        server.store.create("services", service("new"))
        await seen.sync()
        await eventually(lambda: "default/new" in seen.services() and "default/s0" not in seen.services())


@pytest.mark.parametrize("times", [1, 2])
async def test_an_expired_continue_token_starts_the_list_again(
    server: ApiServer, tmp_path: Path, times: int
) -> None:
    for i in range(120):
        server.store.create("services", service(f"s{i}"))
    server.largest_page = 50
    server.fail("continue=", status=410, times=times)
    async with follow(server, tmp_path, tuning=Tuning(page=50, first_pause=0.05)) as seen:
        assert len(seen.state.services) == 120
        assert seen.problems == []
        whole = [q for q in asked(server, "/api/v1/services") if "watch" not in q and "limit" not in q]
        assert len(whole) == times - 1, "the third try is one page"


async def test_selectors(server: ApiServer, tmp_path: Path) -> None:
    store = server.store
    for name, labels in (
        ("plain", {}),
        ("other", {PROXY_NAME: "other"}),
        ("head", {"service.kubernetes.io/headless": ""}),
    ):
        body = service(name)
        body["metadata"]["labels"] = labels
        store.create("services", body)
    async with follow(server, tmp_path) as seen:
        assert seen.services() == {"default/plain"}
        store.patch("services", ("default", "plain"), {"metadata": {"labels": {PROXY_NAME: "other"}}})
        await eventually(lambda: not seen.services())
        store.patch("services", ("default", "plain"), {"metadata": {"labels": {PROXY_NAME: None}}})
        await eventually(lambda: seen.services() == {"default/plain"})
    async with follow(server, tmp_path, proxy_name="other") as seen:
        assert seen.services() == {"default/other"}
        # Slices that nobody gave the label belong to such a Service all the same.
        store.create("endpointslices", endpoints("other", "10.1.0.1"))
        await eventually(lambda: seen.endpoints("other") == {"10.1.0.1"})


@pytest.mark.parametrize("how", ["status", "event", "open"])
async def test_410_lists_again_and_nothing_that_stayed_is_a_change(
    server: ApiServer, tmp_path: Path, how: str
) -> None:
    store = server.store
    for name in ("web", "db"):
        store.create("services", service(name))
        store.create("endpointslices", endpoints(name, "10.1.0.1", "10.1.0.2"))
    async with follow(server, tmp_path) as seen:
        await eventually(lambda: len(server.watches) == 3)
        before, lists = seen.state, seen.source.lists
        if how == "status":
            server.fail("watch=1", status=410, times=3)
            server.order("end")
        elif how == "event":
            store.compact()
            server.order("cut")
        else:
            store.compact()  # the open watches hear of it with the next change
            store.create("events", {"metadata": {"name": "x"}})
        await eventually(lambda: seen.source.lists == lists + 3)
        await eventually(lambda: len(server.watches) == 3)
        assert seen.states == [before]
        # What went while nobody watched is gone after the list; what stayed is the same object.
        await server.stop()
        store.delete("services", ("default", "db"))
        store.create("services", service("new"))
        store.compact()
        await server.start()
        await eventually(lambda: seen.services() == {"default/web", "default/new"})
        web = name_of("default/web")
        assert seen.state.services[web] is before.services[web]
        assert seen.state.slices is before.slices


async def test_a_list_that_was_taken_in_is_forgotten(server: ApiServer, tmp_path: Path) -> None:
    """Its pages are megabytes: neither a frame that lives on nor garbage holds them, whenever that is searched for."""

    def pages() -> int:
        return sum(isinstance(one, Page) for one in gc.get_objects())

    server.store.bulk(100, 100)
    async with follow(server, tmp_path) as seen:
        gc.collect()
        gc.disable()
        try:
            for lists in (3, 6):
                await eventually(lambda: seen.source.lists == lists and len(server.watches) == 3)  # noqa: B023  it is waited for here
                await seen.settled()
                assert pages() == 0
                server.store.compact()
                server.order("cut")
        finally:
            gc.enable()


async def test_changes_of_no_consequence_are_none(server: ApiServer, tmp_path: Path) -> None:
    server.store.create("services", service("web"))
    async with follow(server, tmp_path) as seen:
        before = seen.state
        server.store.patch(
            "services", ("default", "web"), {"metadata": {"managedFields": [{"manager": "x"}]}}
        )
        server.store.create("services", service("db"))
        await eventually(lambda: "default/db" in seen.services())
        web = name_of("default/web")
        assert seen.state.services[web] is before.services[web]


async def test_bookmarks_move_the_place_on(server: ApiServer, tmp_path: Path) -> None:
    server.bookmark_seconds = 0.1
    async with follow(server, tmp_path) as seen:
        await eventually(lambda: len(server.watches) == 3)
        for i in range(5):
            server.store.create("events", {"metadata": {"name": f"e{i}"}})
        newest = str(server.store.rv)
        await eventually(lambda: all(watch.rv >= server.store.rv for watch in server.watches))
        server.order("end", "services")
        await eventually(lambda: asked(server, "/api/v1/services", watch="1", resourceVersion=newest))
        assert seen.source.lists == 3
        assert seen.problems == []


async def test_a_server_restored_from_a_backup(server: ApiServer, tmp_path: Path) -> None:
    """Its versions are lower than ours: a watch from ours would be silent for ever."""
    store = server.store
    store.create("services", service("web"))
    store.rv = 5000
    store.create("services", service("lost"))
    async with follow(server, tmp_path) as seen:
        assert seen.services() == {"default/web", "default/lost"}
        await server.stop()
        del store.objects["services"]["default", "lost"]
        for changes in store.history.values():
            changes.clear()
        store.rv = 200
        store.create("services", service("new"))
        await server.start()
        await eventually(lambda: seen.services() == {"default/web", "default/new"})


async def test_older_servers(server: ApiServer, tmp_path: Path) -> None:
    store = server.store
    store.create("services", service("web"))
    body = endpoints("web", "10.1.0.1")
    body["endpoints"][0]["nodeName"], body["endpoints"][0]["zone"] = "node", "za"
    store.create("endpointslices", body)
    address = {"ip": "10.1.0.2", "nodeName": "node"}
    ports = [{"name": "http", "port": 8080}]
    skip = {"endpointslice.kubernetes.io/skip-mirror": "true"}
    store.create(
        "endpoints",
        {"metadata": {"name": "web", "labels": skip}, "subsets": [{"addresses": [address], "ports": ports}]},
    )
    server.versions = {"v1beta1"}
    async with follow(server, tmp_path) as seen:
        assert seen.source.endpoints_api == "discovery.k8s.io/v1beta1 EndpointSlice"
        endpoint = seen.state.slices[name_of("default/web")][0].endpoints[0]
        assert (endpoint.addresses, endpoint.node_name, endpoint.zone) == (("10.1.0.1",), "node", "za")
    server.versions = set()
    async with follow(server, tmp_path) as seen:
        assert seen.source.endpoints_api == "v1 Endpoints"
        assert seen.endpoints("web") == {"10.1.0.2"}
        store.patch(
            "endpoints",
            ("default", "web"),
            {"subsets": [{"addresses": [{"ip": "10.1.0.3"}], "ports": ports}]},
        )
        await eventually(lambda: seen.endpoints("web") == {"10.1.0.3"})
        # Upgraded: the next watch that ends finds slices.
        server.versions = {"v1"}
        server.order("end", "endpoints")
        await eventually(lambda: seen.endpoints("web") == {"10.1.0.1"})
        assert seen.source.endpoints_api == "discovery.k8s.io/v1 EndpointSlice"
        store.delete("endpoints", ("default", "web"))
        store.patch("endpointslices", ("default", "web-abcde"), {"endpoints": []})
        await eventually(lambda: seen.endpoints("web") == set())


async def test_a_version_that_is_gone_for_a_moment_is_not_given_up(server: ApiServer, tmp_path: Path) -> None:
    server.store.create("endpointslices", endpoints("web", "10.1.0.1"))
    async with follow(server, tmp_path) as seen:
        await eventually(lambda: len(server.watches) == 3)
        for _ in range(2):
            server.fail(f"{SLICES}?", status=404)
        server.order("end", "endpointslices")
        await eventually(lambda: len(asked(server, SLICES, watch="1")) >= 2 and not server.faults)
        await eventually(lambda: seen.source.lists == 4)
        assert seen.source.endpoints_api == "discovery.k8s.io/v1 EndpointSlice"
        assert seen.endpoints("web") == {"10.1.0.1"}
        assert not asked(server, "/api/v1/endpoints")


async def test_objects_that_cannot_be_used(server: ApiServer, tmp_path: Path) -> None:
    store = server.store
    store.create("services", service("good"))
    store.create("services", service("bad", clusterIP="10.96.0.x"))
    async with follow(server, tmp_path) as seen:
        assert seen.services() == {"default/good"}
        assert [str(problem) for problem in seen.problems] == [
            'error: Service default/bad: spec.clusterIP: "10.96.0.x" is not an IP address'
        ]
        # What another watch lists first solves nothing.
        assert seen.source.problems == tuple(seen.problems)
        assert not seen.solved
        store.patch("services", ("default", "good"), {"spec": {"ports": "http"}})
        await eventually(lambda: len(seen.problems) == 2)
        assert "Service default/good: spec.ports: expected a list" in str(seen.problems[1])
        assert seen.services() == {"default/good"}, "the earlier version stays in force"
        server.store.compact()
        server.order("cut")
        await eventually(lambda: seen.source.lists == 6)
        assert seen.services() == {"default/good"}, "through a relist too"
        assert len(seen.problems) == 2, "said once"
        store.patch("services", ("default", "bad"), {"spec": {"clusterIP": "10.96.0.9"}})
        store.patch("services", ("default", "good"), {"spec": {"ports": [{"port": 81}]}})
        await eventually(lambda: "default/bad" in seen.services())
        await eventually(lambda: not seen.source.problems)
        assert sorted(seen.solved) == ["Service default/bad: solved", "Service default/good: solved"]


async def test_nulls_are_missing_values(server: ApiServer, tmp_path: Path) -> None:
    body = endpoints("web")
    body |= {"endpoints": None, "ports": None}
    server.store.create("endpointslices", body)
    server.store.create("services", service("web", externalIPs=None, selector=None))
    async with follow(server, tmp_path) as seen:
        assert seen.services() == {"default/web"}
        assert seen.state.slices[name_of("default/web")][0].endpoints == ()
        assert seen.problems == []


async def test_addresses_are_made_canonical(server: ApiServer, tmp_path: Path) -> None:
    body = endpoints("web", "FD00:0:0::1")
    body["addressType"] = "IPv6"
    server.store.create("endpointslices", body)
    server.store.create(
        "services", service("web", clusterIP="FD00::000A", clusterIPs=["FD00::000A", "10.96.0.7"])
    )
    async with follow(server, tmp_path) as seen:
        assert seen.endpoints("web") == {"fd00::1"}
        web: Service = seen.state.services[name_of("default/web")]
        assert web.spec.all_cluster_ips == ("fd00::a", "10.96.0.7")


async def test_a_storm_comes_in_few_reports(server: ApiServer, tmp_path: Path) -> None:
    server.store.bulk(50, 50)
    async with follow(server, tmp_path) as seen:
        await eventually(lambda: len(server.watches) == 3)
        reports, began = len(seen.states), time.monotonic()
        await server.storm(rate=1000, seconds=1, services=50)
        last = name_of("ns-49/bulk-49")
        await eventually(lambda: seen.state.slices[last][0].endpoints[0].addresses[0] == "10.201.3.231")
        most = 10 + (time.monotonic() - began) / 0.01
        assert len(seen.states) - reports <= most, "at most one each 10 ms"


async def test_the_rate_of_requests_is_limited(server: ApiServer, tmp_path: Path) -> None:
    server.fail("", status=500, times=-1)
    tuning = Tuning(first_pause=0.01, longest_pause=0.01)
    async with follow(server, tmp_path, sync=False, tuning=tuning, qps=20, burst=5) as seen:
        await eventually(lambda: len(server.requests) >= 25)
        assert sum(seen.source.stats.requests.values()) <= len(server.requests)
        started = len(server.requests)
        await eventually(lambda: len(server.requests) >= started + 10)
        (counted,) = set(seen.source.stats.requests)
        assert counted == ("500", "GET", server.url.removeprefix("http://"))
        durations = seen.source.stats.durations["GET", counted[2]]
        assert sum(durations.buckets) == seen.source.stats.requests[counted]
        assert durations.total > 0


def test_only_what_the_role_allows_is_asked_for() -> None:
    """system:node-proxier: list and watch services, endpoints, endpointslices; get, list and watch nodes."""
    access = load_access("", "http://127.0.0.1:1")
    source = ClusterSource(
        access, node_name="n", on_change=print, on_problem=print, on_solved=print, tuning=QUICK
    )
    paths = {resource.path for watcher in source._watchers for resource in watcher._resources}
    assert {re.sub(r"^/apis?/(?:[a-z0-9.]+/)?v1(?:beta1)?/", "", path) for path in paths} == {
        "services",
        "endpoints",
        "endpointslices",
        "nodes",
    }
