"""What takes very long in a machine that is emulated: make test-sctp-long."""

from __future__ import annotations

import pytest

from tests.support.sctplab import SctpLab, one_after_the_other


@pytest.mark.timeout(10_000)
def test_memory_is_flat_over_a_hundred_thousand_associations(sctp: SctpLab) -> None:
    assert one_after_the_other(sctp, 100_000) < 512
