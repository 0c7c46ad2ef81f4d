"""What a Node says of itself, and a kubeconfig that is read again when that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from proxyd.sources.cluster import Node
from proxyd.sources.cluster.objects import Codec
from tests.support.api_server import ApiServer, kubeconfig
from tests.support.cluster_source import follow
from tests.support.waiting import eventually


def node(*addresses: tuple[str, str], **more: Any) -> Node:
    listed = [{"type": kind, "address": address} for kind, address in addresses]
    body = {"metadata": {"name": "node"}, "status": {"addresses": listed, "conditions": []}, **more}
    decoded = Codec(Node).decode(json.dumps(body).encode())
    assert isinstance(decoded, Node)
    return decoded


def test_main_addresses_are_one_of_each_family_internal_ones_first() -> None:
    many = node(
        ("Hostname", "node"),
        ("ExternalIP", "203.0.113.9"),
        ("InternalIP", "10.0.0.9"),
        ("InternalIP", "10.0.0.10"),
        ("ExternalIP", "2001:DB8::9"),
    )
    assert many.host_ips == ("10.0.0.9", "2001:db8::9")
    assert node(("ExternalIP", "203.0.113.9")).host_ips == ("203.0.113.9",)
    assert node(("Hostname", "node"), ("InternalIP", "nonsense")).host_ips == ()


def test_a_node_without_status_has_no_addresses() -> None:
    assert node(status=None).host_ips == ()


async def test_the_heartbeat_of_a_node_is_no_change(server: ApiServer, tmp_path: Path) -> None:
    async with follow(server, tmp_path) as seen:
        server.store.patch("nodes", ("", "node"), {"status": {"conditions": [{"type": "Ready"}]}})
        server.store.create("services", {"metadata": {"name": "after"}})
        await eventually(lambda: "default/after" in seen.services())
        assert seen.states[0].node is seen.state.node


async def test_a_kubeconfig_is_read_again_when_asked_to(server: ApiServer, tmp_path: Path) -> None:
    server.tokens = {"old": "me", "new": "me"}
    async with follow(server, tmp_path, user={"token": "old"}) as seen:
        (tmp_path / "kubeconfig").write_text(kubeconfig(server.url, user={"token": "new"}))
        seen.source.reread()
        del server.tokens["old"]
        server.cut()
        server.store.create("services", {"metadata": {"name": "after"}})
        await eventually(lambda: "default/after" in seen.services())
        assert not seen.said("401")
