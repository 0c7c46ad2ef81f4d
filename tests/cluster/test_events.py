"""Events about Services and the node, as the API server gets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proxyd.sources.cluster import EventAbout
from tests.support.api_server import ApiServer
from tests.support.cluster_source import follow
from tests.support.waiting import eventually

WEB = EventAbout(kind="Service", name="web", namespace="prod", uid="1")


def events(server: ApiServer) -> list[dict[str, Any]]:
    return [stored.body for stored in server.store.objects["events"].values()]


async def test_an_event_is_sent_and_repetitions_are_counted(server: ApiServer, tmp_path: Path) -> None:
    async with follow(server, tmp_path) as seen:
        seen.source.post_event(WEB, "Warning", "PortConflict", "10.0.0.1:80 is held by prod/other")
        await eventually(lambda: events(server))
        (event,) = events(server)
        assert event["metadata"]["namespace"] == "prod"
        assert event["involvedObject"] == {
            "kind": "Service",
            "apiVersion": "v1",
            "namespace": "prod",
            "name": "web",
            "uid": "1",
        }
        assert (event["type"], event["reason"], event["count"]) == ("Warning", "PortConflict", 1)
        assert event["source"] == {"component": "proxyd", "host": "node"}
        for _ in range(3):
            seen.source.post_event(WEB, "Warning", "PortConflict", "10.0.0.1:80 is held by prod/other")
        await eventually(lambda: events(server)[0]["count"] == 4)
        assert len(events(server)) == 1
        # An Event lives for an hour; the next one is a new one.
        server.store.delete("events", ("prod", event["metadata"]["name"]))
        seen.source.post_event(WEB, "Warning", "PortConflict", "10.0.0.1:80 is held by prod/other")
        await eventually(lambda: events(server))
        assert events(server)[0]["count"] == 1
        seen.source.post_event(EventAbout(kind="Node", name="node", uid="node"), "Normal", "Starting", "")
        await eventually(lambda: len(events(server)) == 2)
        assert events(server)[1]["metadata"]["namespace"] == "default"
        assert "namespace" not in events(server)[1]["involvedObject"]


async def test_events_never_wait_and_are_never_too_many(server: ApiServer, tmp_path: Path) -> None:
    async with follow(server, tmp_path) as seen:
        await server.stop()
        for i in range(1000):
            about = EventAbout(kind="Service", name=f"s{i}", namespace="prod")
            seen.source.post_event(about, "Warning", "PortConflict", "x")
        assert seen.source.events_dropped >= 900
        await server.start()
        await eventually(lambda: events(server))


async def test_one_object_does_not_flood_the_server(server: ApiServer, tmp_path: Path) -> None:
    async with follow(server, tmp_path) as seen:
        for i in range(60):
            seen.source.post_event(WEB, "Warning", "PortConflict", f"message {i}")
        assert seen.source.events_dropped == 35
        await eventually(lambda: len(events(server)) == 25)


async def test_events_that_are_forbidden_are_told_of_once(server: ApiServer, tmp_path: Path) -> None:
    server.fail("/events", status=403, times=-1)
    async with follow(server, tmp_path) as seen:
        for i in range(5):
            seen.source.post_event(WEB, "Warning", "PortConflict", f"message {i}")
        await eventually(lambda: seen.source.events_dropped == 5)
        assert seen.said("events are not sent: 403") == len(seen.problems) == 1
