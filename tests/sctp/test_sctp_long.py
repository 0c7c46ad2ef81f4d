"""What takes very long in a machine that is emulated: make test-sctp-long."""

from __future__ import annotations

import pytest

from tests.support.sctplab import SctpLab, resident_by_round


@pytest.mark.timeout(10_000)
def test_memory_is_flat_over_a_hundred_thousand_associations(sctp: SctpLab) -> None:
    first, *_, last = resident_by_round(sctp, 10_000, 10)
    assert last - first < 512
