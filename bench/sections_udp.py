"""The measurement of UDP: queries on flows that exist, queries on new flows, loss."""

from __future__ import annotations

from bench.harness import FRESH, LIVE, Bench
from bench.peers import Proxy

PACED_RATE = 10_000.0
LOSS_RATE = 20_000.0


def udp(bench: Bench, kind: type[Proxy]) -> dict[str, float]:
    """CPU per query, queries a second, and percent lost at a fixed rate."""
    with bench.serving(kind, LIVE, FRESH) as proxy:
        most, _ = bench.datagrams(proxy, LIVE.name, "live")
        paced, _ = bench.datagrams(proxy, LIVE.name, "live", PACED_RATE)
        fresh, _ = bench.datagrams(proxy, FRESH.name, "fresh")
        _, found = bench.datagrams(proxy, LIVE.name, "live", LOSS_RATE)
    return {
        "udp.live.cpu": most.micros,
        "udp.live.rate": most.rate,
        "udp.live.busy": most.busy,
        "udp.paced.cpu": paced.micros,
        "udp.fresh.cpu": fresh.micros,
        "udp.fresh.rate": fresh.rate,
        "udp.loss": 100 * (1 - found["answered"] / found["sent"]),
    }
