from __future__ import annotations

from collections import Counter

import pytest

from proxyd.relay.engine import balancer as module
from proxyd.relay.engine.balancer import MAX_PASSED, SUSPECT_SECONDS, Balancer, Endpoint


def endpoint(number: int) -> Endpoint:
    return Endpoint(f"10.0.0.{number}", 80, number, number * 8)


def make(*numbers: int, affinity: int = 0, positions: list[int] | None = None) -> Balancer:
    balancer = Balancer("prod/web", [0] if positions is None else positions, 0, 0)
    balancer.update([endpoint(n) for n in numbers], affinity)
    return balancer


def picks(balancer: Balancer, count: int, client: str = "c", now: float = 0.0) -> list[int]:
    chosen = [balancer.pick(client, now) for _ in range(count)]
    return [one.slot for one in chosen if one is not None]


def test_round_robin_is_exact_and_goes_on_from_the_shared_position() -> None:
    positions = [0]
    first, second = make(1, 2, 3, positions=positions), make(1, 2, 3, positions=positions)
    assert picks(first, 4) == [1, 2, 3, 1]
    assert picks(second, 3) == [2, 3, 1]


def test_the_position_wraps_at_64_bits() -> None:
    positions = [(1 << 64) - 1]
    picks(make(1, 2, positions=positions), 1)
    assert positions == [0]


def test_nothing_to_pick_from() -> None:
    assert make().pick("c", 0.0) is None
    assert make(affinity=10).pick("c", 0.0) is None


def test_tried_endpoints_are_not_picked_again() -> None:
    balancer = make(1, 2, 3)
    tried: list[Endpoint] = []
    while (chosen := balancer.pick("c", 0.0, tried)) is not None:
        assert chosen not in tried
        tried.append(chosen)
    assert sorted(one.slot for one in tried) == [1, 2, 3]


def test_a_failed_endpoint_is_passed_over_for_a_while_and_the_rest_stays_even() -> None:
    balancer = make(1, 2, 3)
    bad = balancer.endpoints[1]
    balancer.failed("c", bad, 100.0)
    assert Counter(picks(balancer, 30, now=100.5)) == {1: 15, 3: 15}
    assert Counter(picks(balancer, 30, now=100.0 + SUSPECT_SECONDS)) == {1: 10, 2: 10, 3: 10}
    assert not balancer.suspects


def test_where_all_have_failed_they_are_still_tried() -> None:
    balancer = make(1, 2)
    for one in balancer.endpoints:
        balancer.failed("c", one, 0.0)
    assert len(picks(balancer, 2)) == 2


def test_an_update_keeps_what_stays_and_its_suspicion() -> None:
    balancer = make(1, 2)
    kept, gone = balancer.endpoints
    balancer.failed("c", kept, 0.0)
    balancer.failed("c", gone, 0.0)
    balancer.update([endpoint(1), endpoint(3)], 0)
    assert balancer.endpoints[0] is kept
    assert list(balancer.suspects) == [kept]
    assert gone.removed
    balancer.failed("c", gone, 0.0)  # by a relay that was dialling it meanwhile
    assert gone not in balancer.suspects


def test_affinity_keeps_a_client_and_spreads_clients() -> None:
    balancer = make(1, 2, 3, affinity=10)
    assert picks(balancer, 3, "a") == [1, 1, 1]
    assert picks(balancer, 3, "b") == [2, 2, 2]
    assert picks(balancer, 1, "a") == [1]


def test_affinity_time_slides_and_begins_at_the_end_of_the_last_relay() -> None:
    balancer = make(1, 2, affinity=10)
    chosen = balancer.pick("a", 0.0)
    assert chosen is not None
    assert picks(balancer, 1, "a", 1000.0) == [1], "an open relay keeps the entry alive"
    balancer.ended("a", chosen, 1000.0)
    balancer.ended("a", chosen, 1001.0)
    assert picks(balancer, 1, "a", 1010.9) == [1]
    balancer.ended("a", chosen, 1010.9)
    assert picks(balancer, 1, "a", 1020.9) == [2]


def test_a_change_of_the_affinity_time_takes_effect_at_once() -> None:
    balancer = make(1, 2, affinity=1000)
    chosen = balancer.pick("a", 0.0)
    assert chosen is not None
    balancer.ended("a", chosen, 0.0)
    balancer.update([endpoint(1), endpoint(2)], 5)
    assert picks(balancer, 1, "a", 6.0) == [2]
    balancer.update([endpoint(1), endpoint(2)], 0)
    assert len(balancer) == 0


def test_a_removed_endpoint_lets_its_clients_go_even_if_it_comes_back() -> None:
    balancer = make(1, 2, affinity=10)
    assert picks(balancer, 1, "a") == [1]
    balancer.update([endpoint(2)], 10)
    balancer.update([endpoint(1), endpoint(2)], 10)
    assert picks(balancer, 2, "a") == [2, 2]


def test_a_failed_dial_moves_the_client_for_good() -> None:
    balancer = make(1, 2, affinity=10)
    first = balancer.pick("a", 0.0)
    assert first is not None
    balancer.failed("a", first, 0.0)
    assert picks(balancer, 1, "a", 0.1) == [2]
    balancer.ended("a", first, 0.2)  # the old one: changes nothing
    assert picks(balancer, 1, "a", 5.0) == [2]


def test_the_failure_of_an_endpoint_moves_no_other_client() -> None:
    balancer = make(1, 2, affinity=10)
    first = balancer.pick("a", 0.0)
    assert first is not None
    assert picks(balancer, 2, "b") == [2, 2]
    balancer.failed("c", first, 0.0)
    assert balancer.pick("a", 0.0) is first


def test_the_client_table_is_bounded_and_drops_the_longest_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CLIENTS", 100)
    balancer = make(1, 2, 3, affinity=10)
    first = balancer.pick("client 0", 0.0)
    for number in range(1, 100):
        balancer.pick(f"client {number}", 0.0)
    assert balancer.pick("client 0", 1.0) is first
    for number in range(100, 150):
        balancer.pick(f"client {number}", 1.0)
    assert len(balancer) == 100
    assert balancer.pick("client 0", 2.0) is first, "it was used, so others went before it"


def test_clients_over_time_are_forgotten_as_new_ones_come() -> None:
    balancer = make(1, 2, affinity=10)
    for number in range(50):
        chosen = balancer.pick(f"old {number}", 0.0)
        assert chosen is not None
        balancer.ended(f"old {number}", chosen, 0.0)
    for number in range(50):
        balancer.pick(f"new {number}", 20.0)
    assert len(balancer) == 50


def test_of_thousands_of_dead_endpoints_not_all_are_looked_at_for_each_choice() -> None:
    positions = [0]
    balancer = make(*range(3000), positions=positions)
    for one in balancer.endpoints:
        balancer.failed("c", one, 0.0)
    tried: list[Endpoint] = []
    for _ in range(10):
        before = positions[0]
        chosen = balancer.pick("c", 0.0, tried)
        assert chosen is not None
        assert chosen not in tried
        assert positions[0] - before <= MAX_PASSED
        tried.append(chosen)
