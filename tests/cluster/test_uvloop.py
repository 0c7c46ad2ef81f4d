"""The same on the loop that the daemon runs on; all other tests run on asyncio's own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from test_events import test_an_event_is_sent_and_repetitions_are_counted as events
from test_follow import test_changes_are_followed as changes
from test_outages import test_a_server_that_is_away_at_start as away
from test_outages import test_a_stream_cut_in_the_middle_of_a_line as cut
from test_outages import test_a_stream_that_hangs as hung
from test_outages import test_twenty_restarts as restarts

from tests.support.api_server import ApiServer

Scenario = Callable[[ApiServer, Path], Awaitable[None]]


@pytest.mark.parametrize(
    "scenario", [away, changes, cut, events, hung, restarts], ids=lambda one: one.__name__
)
def test_on_uvloop(tmp_path: Path, scenario: Scenario) -> None:
    async def run() -> None:
        async with ApiServer() as server:
            labels = {"topology.kubernetes.io/zone": "za"}
            server.store.create("nodes", {"metadata": {"name": "node", "labels": labels}})
            await scenario(server, tmp_path)

    uvloop.run(run())
