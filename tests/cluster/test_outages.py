"""What happens to a source when the API server fails in all the ways it can."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from proxyd.sources.cluster import Tuning
from tests.support.api_server import ApiServer, kubeconfig
from tests.support.cluster_source import QUICK, Follower, endpoints, follow, service
from tests.support.waiting import eventually


async def follows(server: ApiServer, seen: Follower, name: str) -> None:
    """The source still sees changes."""
    server.store.create("services", service(name))
    await eventually(lambda: f"default/{name}" in seen.services())


async def test_a_stream_cut_in_the_middle_of_a_line(server: ApiServer, tmp_path: Path) -> None:
    async with follow(server, tmp_path) as seen:
        for i in range(5):
            await eventually(lambda: len(server.watches) == 3)
            await seen.settled()
            assert server.cut() == 3
            await follows(server, seen, f"s{i}")
        assert seen.source.lists == 3, "nothing is listed again"
        assert len(seen.services()) == 5
        assert seen.problems == []


async def test_garbage(server: ApiServer, tmp_path: Path) -> None:
    async with follow(server, tmp_path) as seen:
        await eventually(lambda: len(server.watches) == 3)
        server.order(b'{"type":"MODI\x00\xff}\n', "services")
        await eventually(lambda: seen.problems)
        assert "the watch sent garbage" in str(seen.problems[0])
        await follows(server, seen, "web")
        await eventually(lambda: seen.solved)
        assert len(seen.problems) == len(seen.solved) == 1
        assert not seen.source.problems


async def test_nothing_but_garbage_from_a_place_leads_to_a_new_list(
    server: ApiServer, tmp_path: Path
) -> None:
    async with follow(server, tmp_path) as seen:
        await eventually(lambda: len(server.watches) == 3)
        server.fail("watch=1", body="<html>a proxy's login page</html>\n", times=4)
        server.order("cut", "services")
        await eventually(lambda: seen.source.lists > 3)
        await follows(server, seen, "web")
        assert 1 <= len(seen.problems) <= 3


async def test_a_stream_that_hangs(server: ApiServer, tmp_path: Path) -> None:
    tuning = replace(QUICK, watch_seconds=(1, 1), slack_seconds=0.5)
    async with follow(server, tmp_path, tuning=tuning) as seen:
        await eventually(lambda: len(server.watches) == 3)
        server.hang("services")
        await eventually(lambda: any(watch.hung for watch in server.watches))
        server.store.create("services", service("web"))
        await eventually(seen.services)
        assert seen.said("the connection hangs") == 1


async def test_a_server_that_does_not_answer(server: ApiServer, tmp_path: Path) -> None:
    fault = server.fail("/services", hang=True)
    async with follow(server, tmp_path, sync=False) as seen:
        await eventually(lambda: fault not in server.faults)
        await eventually(lambda: len(server.watches) == 2)
        assert not seen.source.synced


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"status": 500}, "500 failing as told"),
        ({"status": 503}, "503 failing as told"),
        ({"status": 429}, "429 failing as told"),
        ({"status": 401}, "401 failing as told: check the credentials"),
        ({"status": 403}, "403 failing as told: give this user the ClusterRole system:node-proxier"),
        ({"status": 302, "body": "moved"}, "302"),
        ({}, "the connection was cut off"),
        ({"body": "<html>"}, "is garbage"),
    ],
)
async def test_lists_that_fail_are_tried_again_and_told_of_once(
    server: ApiServer, tmp_path: Path, fault: dict[str, object], text: str
) -> None:
    server.store.create("services", service("web"))
    server.fail("/api/v1/services", times=6, **fault)
    async with follow(server, tmp_path) as seen:
        assert seen.services() == {"default/web"}
        assert seen.said(text) == 1
        assert len(seen.problems) == 1
        await eventually(lambda: len(seen.solved) == 1)
        assert "answers again after" in seen.solved[0]
        assert not seen.source.problems


async def test_retry_after_is_heeded(server: ApiServer, tmp_path: Path) -> None:
    fault = server.fail("/api/v1/services", status=429, retry_after=1)
    async with follow(server, tmp_path, sync=False) as seen:
        await seen.sync()
        assert fault not in server.faults
        assert time.monotonic() - fault.answered >= 1


async def test_watches_that_are_refused(server: ApiServer, tmp_path: Path) -> None:
    async with follow(server, tmp_path) as seen:
        await eventually(lambda: len(server.watches) == 3)
        fault = server.fail("watch=1", status=503, times=-1)
        server.order("cut")
        await eventually(lambda: len(seen.problems) == 3)  # one for each of the three, and no more
        for _ in range(2):
            asked = len(server.requests)
            await eventually(lambda: len(server.requests) > asked + 6)  # noqa: B023  it is waited for here
        server.store.create("services", service("web"))
        server.faults.remove(fault)
        await eventually(seen.services)
        await eventually(lambda: seen.solved)
        assert (len(seen.problems), len(seen.solved), seen.source.lists) == (3, 1, 3)


async def test_a_server_that_is_away_at_start(server: ApiServer, tmp_path: Path) -> None:
    await server.stop()
    async with follow(server, tmp_path, sync=False) as seen:
        await eventually(lambda: seen.problems)
        assert str(seen.problems[0]) == (
            f"warning: API server 127.0.0.1:{server.port}: cannot connect: connection refused"
        )
        await server.start()
        await seen.sync()
        assert len(seen.problems) == len(seen.solved) == 1


async def test_a_name_that_cannot_be_resolved(server: ApiServer, tmp_path: Path) -> None:
    server.port = 6443
    await server.stop()
    path = tmp_path / "other"
    path.write_text(kubeconfig("https://api.invalid:6443"))
    seen = Follower(path)
    task = asyncio.ensure_future(seen.source.run())
    await eventually(lambda: seen.problems)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert "api.invalid: the name cannot be resolved" in str(seen.problems[0])
    assert len(seen.problems) == 1


async def test_twenty_restarts(server: ApiServer, tmp_path: Path) -> None:
    server.store.create("services", service("web"))
    server.store.create("endpointslices", endpoints("web", "10.1.0.1"))
    async with follow(server, tmp_path) as seen:
        first = seen.state
        for i in range(20):
            await eventually(lambda: len(server.watches) == 3)
            await seen.settled()
            await server.stop()
            if i % 2:
                await eventually(lambda: seen.source.problems)
            assert seen.services() >= {"default/web"}, "what is known stays"
            server.store.create("services", service(f"s{i}"))
            await server.start()
            await eventually(lambda: f"default/s{i}" in seen.services())  # noqa: B023  it is waited for here
        assert len(seen.services()) == 21
        assert seen.state.slices is first.slices
        assert seen.source.lists == 3
        await eventually(lambda: not seen.source.problems)
        assert 10 <= len(seen.problems) <= 20
        assert len(seen.solved) == len(seen.problems)


async def test_no_word_and_no_pause_for_watches_that_end_as_they_should(
    server: ApiServer, tmp_path: Path
) -> None:
    tuning = replace(QUICK, watch_seconds=(1, 1))
    async with follow(server, tmp_path, tuning=tuning) as seen:
        await eventually(lambda: sum("watch=1" in request for request in server.requests) >= 9)
        await follows(server, seen, "web")
        assert seen.problems == []
        assert seen.source.lists == 3


async def test_a_server_that_ends_watches_at_once_is_not_asked_all_the_time(
    server: ApiServer, tmp_path: Path
) -> None:
    tuning = Tuning(first_pause=0.2, longest_pause=1.0)
    server.fail("watch=1", body="\n", times=-1)
    async with follow(server, tmp_path, tuning=tuning) as seen:
        await eventually(lambda: seen.said("the watch ended at once"))
        started, asked = time.monotonic(), len(server.requests)
        await eventually(lambda: time.monotonic() > started + 1.5)
        assert len(server.requests) - asked < 27 * (time.monotonic() - started)


async def test_what_was_said_is_bounded(server: ApiServer, tmp_path: Path) -> None:
    for i in range(40):
        server.fail("/api/v1/services", status=500 + i)
    async with follow(server, tmp_path, tuning=replace(QUICK, first_pause=0.01, longest_pause=0.01)) as seen:
        assert len(seen.problems) == 20
