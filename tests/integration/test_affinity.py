"""ClientIP affinity through the real program, where two workers share the connections of other Services."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import ask, connect, many, read_all, records
from tests.support.daemon import Proxyd
from tests.support.manifests import endpoints, service, write
from tests.support.netlab import NODE_IP, Lab
from tests.support.waiting import wait_for

VIP = "10.96.0.10"
OTHER_VIP = "10.96.0.20"

Run = Callable[..., Proxyd]


def sticky(seconds: int | None = None) -> dict[str, Any]:
    """`spec` of ClientIP affinity."""
    spec: dict[str, Any] = {"sessionAffinity": "ClientIP"}
    if seconds is not None:
        spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": seconds}}
    return spec


def test_a_client_keeps_its_endpoint(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, node_port=30080, **sticky()), endpoints("web", 1, 2, 3))
    write(manifests / "other.yaml", service("other", OTHER_VIP), endpoints("other", 1, 2, 3))
    daemon = proxyd(workers=2)
    for ip, port in ((VIP, 80), (NODE_IP, 30080), (OTHER_VIP, 80)):
        daemon.wait_listener(ip, port)
    kept = {}
    for origin in (lab.client, lab.outside, lab.pods[0], lab.pods[1]):
        answered = many(origin, VIP, 80, 40).answered
        assert len(answered) == 1, f"{origin.name}: {answered}"
        (kept[origin.name],) = answered
    assert len(set(kept.values())) > 1  # they were not all sent to one place
    # The Service's other addresses are the same service port.
    assert set(many(lab.outside, NODE_IP, 30080, 10).answered) == {kept["outside"]}
    assert len(many(lab.client, OTHER_VIP, 80, 30).answered) == 3


def test_affinity_ends_with_its_endpoint(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, **sticky()))
    write(manifests / "endpoints.yaml", endpoints("web", 1, 2, 3))
    daemon = proxyd(workers=2)
    daemon.wait_listener(VIP, 80)
    first = ask(lab.client, VIP, 80)
    others = [number for number in (1, 2, 3) if f"pod-{number}" != first]
    write(manifests / "endpoints.yaml", endpoints("web", *others))
    second = wait_for(lambda: (now := ask(lab.client, VIP, 80)) != first and now, "another endpoint")
    write(manifests / "endpoints.yaml", endpoints("web", 1, 2, 3))
    assert many(lab.client, VIP, 80, 20).answered == {second: 20}


def test_affinity_passes_over_a_dead_endpoint(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, **sticky()), endpoints("web", 1, 2, 3))
    access = manifests.parent / "access.log"
    daemon = proxyd(workers=2, flags=("--access-log", str(access)))
    daemon.wait_listener(VIP, 80)
    first = ask(lab.client, VIP, 80)
    lab.blackhole_pod(int(first.removeprefix("pod-")))
    second = ask(lab.client, VIP, 80)
    assert second != first
    assert many(lab.client, VIP, 80, 10).answered == {second: 10}
    attempts = [record["attempts"] for record in records(access, 12)]
    assert attempts[1] > 1
    assert sum(count > 1 for count in attempts[2:]) < 5  # it was not tried again each time


def test_affinity_is_forgotten_after_its_timeout(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, **sticky(4)), endpoints("web", 1, 2, 3))
    daemon = proxyd(workers=2)
    daemon.wait_listener(VIP, 80)
    first = ask(lab.client, VIP, 80)
    # It slides: used again within the timeout, it lasts beyond the first one's end.
    for _ in range(3):
        time.sleep(1.5)
        assert ask(lab.client, VIP, 80) == first
    # Idle for longer, the client is a new one and takes its turn: over a few rounds it is not always the same.
    for _ in range(3):
        time.sleep(4.5)
        if ask(lab.client, VIP, 80) != first:
            break
    else:
        pytest.fail("it is never forgotten")


def test_affinity_switched_on_and_off(lab: Lab, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1, 2, 3))
    daemon = proxyd(workers=2)
    daemon.wait_listener(VIP, 80)
    with connect(lab.client, VIP, 80) as kept:
        assert len(many(lab.client, VIP, 80, 9).answered) == 3
        write(manifests / "web.yaml", service("web", VIP, **sticky()), endpoints("web", 1, 2, 3))
        wait_for(lambda: len(many(lab.client, VIP, 80, 9).answered) == 1, "affinity to be on")
        write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1, 2, 3))
        wait_for(lambda: len(many(lab.client, VIP, 80, 9).answered) == 3, "affinity to be off")
        kept.sendall(b"who\n")
        assert read_all(kept).startswith(b"pod-")
