"""The annotations by which a Service, a Pod or endpoints have further addresses for SCTP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from proxyd.api.addresses import parse_ip, refused_endpoint
from proxyd.api.findings import Findings, Path, shown
from proxyd.api.service import SCTP_ADDRESSES, SCTP_ENDPOINT_ADDRESSES

# The kernel takes more, but an INIT chunk with all of them should fit into one packet.
MAX_FURTHER = 15


@lru_cache(4096)
def parse_addresses(text: str) -> tuple[str, ...]:
    """The addresses of `proxyd.io/sctp-addresses`: `10.2.0.7, fd00::7`.

    Raises:
        ValueError: what is wrong, to be shown after the annotation's name.
    """
    found: dict[str, None] = {}
    for item in text.split(","):
        one = item.strip()
        address = parse_ip(one)
        if address is None:
            raise ValueError(f"expected IP addresses separated by commas, got {shown(one)}")
        if address.is_unspecified or address.is_multicast:
            raise ValueError(f"{shown(one)} is no address of a host")
        found[str(address)] = None
    if len(found) > MAX_FURTHER:
        raise ValueError(f"at most {MAX_FURTHER} further addresses, got {len(found)}")
    return tuple(found)


@lru_cache(4096)
def parse_endpoint_addresses(text: str) -> Mapping[str, tuple[str, ...]]:
    """The further addresses of endpoints, as in `10.1.0.7=10.2.0.7,10.3.0.7; 10.1.0.8=10.2.0.8`.

    Raises:
        ValueError: what is wrong, to be shown after the annotation's name.
    """
    found: dict[str, tuple[str, ...]] = {}
    for item in text.split(";"):
        if not item.strip():
            continue
        first, equals, further = item.partition("=")
        address = parse_ip(first.strip())
        if not equals or address is None:
            raise ValueError(f"expected ADDRESS=FURTHER,...; ..., got {shown(item.strip())}")
        found[str(address)] = parse_addresses(further)
    return found


def written(further: Mapping[str, tuple[str, ...]]) -> str:
    """The text that `parse_endpoint_addresses` reads."""
    return "; ".join(f"{first}={','.join(others)}" for first, others in further.items())


def further_addresses(
    annotations: Mapping[str, str], service_cidrs: tuple[str, ...]
) -> Mapping[str, tuple[str, ...]]:
    """The content of `proxyd.io/sctp-endpoint-addresses`, without addresses that endpoints may not have.

    It is {} if the annotation is wrong. Only an endpoint on loopback may have another loopback address:
    somebody allowed it for a local test.
    """
    text = annotations.get(SCTP_ENDPOINT_ADDRESSES)
    if text is None:
        return {}
    try:
        given = parse_endpoint_addresses(text)
    except ValueError:
        return {}
    found = {}
    for first, others in given.items():
        main = parse_ip(first)
        local = main is not None and main.is_loopback
        kept = tuple(
            one
            for one in others
            if one != first and not refused_endpoint(one, service_cidrs, allow_loopback=local)
        )
        if kept:
            found[first] = kept
    return found


def service_addresses(annotations: Mapping[str, str]) -> tuple[str, ...]:
    """The content of `proxyd.io/sctp-addresses`; () if it is missing or wrong."""
    text = annotations.get(SCTP_ADDRESSES)
    if text is None:
        return ()
    try:
        return parse_addresses(text)
    except ValueError:
        return ()


def check_annotations(annotations: Mapping[str, str], found: Findings) -> None:
    """Add a warning to `found` for each of the two annotations that has no effect."""
    for name, parse in (
        (SCTP_ADDRESSES, parse_addresses),
        (SCTP_ENDPOINT_ADDRESSES, parse_endpoint_addresses),
    ):
        text = annotations.get(name)
        if text is None:
            continue
        try:
            parse(text)
        except ValueError as error:
            path: Path = ("metadata", "annotations", name)
            found.warning(path, f"has no effect: {error}")
