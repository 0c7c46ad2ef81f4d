"""Network programming latency: which changes are measured, and until when."""

from __future__ import annotations

from proxyd.api.discovery import EndpointSlice
from proxyd.api.meta import ObjectMeta, ObjectName
from proxyd.control.observe.programming_latency import TRIGGER_TIME, ProgrammingLatency

WEB = ObjectName("prod", "web")
BEGAN = 1_700_000_000.0  # 2023-11-14T22:13:20Z


class Measured:
    """A measurement with a clock of its own."""

    def __init__(self) -> None:
        self.now = BEGAN
        self.seconds: list[float] = []
        self.slices: dict[ObjectName, tuple[EndpointSlice, ...]] = {}
        self.programming = ProgrammingLatency(self.seconds.append, clock=lambda: self.now)

    def change(self, *times: str) -> None:
        """The Service has slices with these trigger times."""
        before = self.slices
        made = [
            EndpointSlice(
                metadata=ObjectMeta(name=f"web-{i}", annotations={TRIGGER_TIME: text} if text else {})
            )
            for i, text in enumerate(times)
        ]
        self.slices = {WEB: tuple(made)}
        self.programming.changed([WEB], before, self.slices)


def test_a_change_ends_when_every_worker_has_it() -> None:
    it = Measured()
    it.change("2023-11-14T22:13:30Z", "2023-11-14T22:13:31.5Z")
    it.now = BEGAN + 12
    it.programming.reconciled(7)
    it.programming.acknowledged(6)
    assert it.seconds == []
    it.now = BEGAN + 13
    it.programming.acknowledged(7)
    assert sorted(it.seconds) == [1.5, 3.0]
    it.programming.acknowledged(8)
    assert len(it.seconds) == 2


def test_only_new_times_count() -> None:
    it = Measured()
    it.change("2023-11-14T22:13:30Z")
    it.change("2023-11-14T22:13:30Z", "")
    it.change("2023-11-14T22:13:30Z", "2023-11-14T22:13:40Z")
    it.change()
    it.now = BEGAN + 20
    it.programming.reconciled(1)
    it.programming.acknowledged(1)
    assert sorted(it.seconds) == [0.0, 10.0]


def test_times_before_the_start_and_garbage_do_not_count() -> None:
    it = Measured()
    it.change("2023-11-14T22:13:19Z", "yesterday", "2023-11-14T23:00:00", "")
    it.programming.reconciled(1)
    it.programming.acknowledged(1)
    assert it.seconds == []


def test_a_clock_that_was_set_back_gives_zero() -> None:
    it = Measured()
    it.change("2023-11-14T22:13:30Z")
    it.programming.reconciled(1)
    it.programming.acknowledged(1)
    assert it.seconds == [0.0]
