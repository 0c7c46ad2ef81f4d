"""Fixtures of the tests of the API source."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.support.api_server import ApiServer


@pytest_asyncio.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with ApiServer() as running:
        labels = {"topology.kubernetes.io/zone": "za"}
        running.store.create("nodes", {"metadata": {"name": "node", "labels": labels}})
        yield running
