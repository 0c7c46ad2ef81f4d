"""The operator's settings on which the validation of objects depends."""

from __future__ import annotations

import msgspec

from proxyd.api.addresses import parse_cidr

DEFAULT_NODE_PORT_RANGE = (30000, 32767)


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of validation.

    Raises:
        ValueError: a service CIDR is not valid.
    """

    node_port_range: tuple[int, int] = DEFAULT_NODE_PORT_RANGE  # first and last
    service_cidrs: tuple[str, ...] = ()  # the ranges of VIPs: no endpoint may be in them
    allow_loopback_endpoints: bool = False  # endpoints in 127.0.0.0/8 and ::1, for local testing
    unknown_fields: bool = False  # warn of fields that are probably mistyped

    def __post_init__(self) -> None:
        for text in self.service_cidrs:
            if parse_cidr(text) is None:
                msg = f"{text!r} is not a CIDR"
                raise ValueError(msg)
