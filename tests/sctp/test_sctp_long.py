"""What takes very long in a machine that is emulated: make test-sctp-long."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from probe import Association
from sctplab import SctpLab
from test_sctp_load import one_after_the_other
from test_sctp_messages import Flow, both_ways

Join = Callable[..., tuple[Association, Association]]


@pytest.mark.timeout(3000)
def test_hundred_thousand_messages_both_ways(join: Join) -> None:
    client, server = join(outgoing=17, incoming=17)
    both_ways(client, server, Flow(100_000, 17, 20_000))


@pytest.mark.timeout(10_000)
def test_memory_is_flat_over_a_hundred_thousand_associations(sctp: SctpLab) -> None:
    assert one_after_the_other(sctp, 100_000) < 512
