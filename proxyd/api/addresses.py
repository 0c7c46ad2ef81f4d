"""Reads IP addresses and CIDRs as Kubernetes does, and knows the addresses that may not be endpoints."""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# The range of VIPs where proxyd runs without root. An endpoint in it would be a listener of proxyd's own.
LOOPBACK_SERVICE_CIDR = "127.96.0.0/16"

_LINK_LOCAL_MULTICAST: dict[int, Network] = {4: IPv4Network("224.0.0.0/24"), 6: IPv6Network("ff02::/16")}
_CACHED = 16384  # so many texts take about 3 MB


@lru_cache(_CACHED)
def parse_ip(text: str) -> Address | None:
    """The address that a text stands for, or None.

    As in Kubernetes, numbers with leading zeros and zone identifiers are refused, and an IPv4 address written
    as IPv6 (::ffff:10.0.0.1) is the IPv4 address.
    """
    if "%" in text:
        return None
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


@lru_cache(_CACHED)
def canonical_ip(text: str) -> str:
    """The canonical text of an address; a text that is no address is returned as it is."""
    address = parse_ip(text)
    return text if address is None else str(address)


@lru_cache(1024)
def parse_cidr(text: str) -> Network | None:
    """The network that a text stands for, or None. Bits after the prefix are dropped, as in Kubernetes."""
    if not re.fullmatch(r"[0-9A-Fa-f.:]+/(0|[1-9][0-9]{0,2})", text):
        return None
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None


def not_an_ip(text: str) -> str:
    """Why a text is not an address, as a message continues after the text."""
    if re.search(r"(^|\.)0[0-9]", text) and ":" not in text:
        return "is not an IP address: leading zeros are not allowed"
    return "is not an IP address"


@lru_cache(_CACHED)
def special(text: str, *, allow_loopback: bool = False) -> str:
    """Why an address may be neither that of an endpoint nor that of a listener; "" if it may.

    The texts for IPv4 are those of Kubernetes (pkg/apis/core/validation, ValidateNonSpecialIP).

    Args:
        text: an address that `parse_ip` accepts.
        allow_loopback: whether a loopback address is allowed.
    """
    address = parse_ip(text)
    if address is None:
        return not_an_ip(text)
    v4 = address.version == 4
    if address.is_unspecified:
        return "may not be unspecified " + ("(0.0.0.0)" if v4 else "(::)")
    if address.is_loopback and not allow_loopback:
        return "may not be in the loopback range " + ("(127.0.0.0/8)" if v4 else "(::1)")
    if address.is_link_local:
        return "may not be in the link-local range " + ("(169.254.0.0/16)" if v4 else "(fe80::/10)")
    multicast = _LINK_LOCAL_MULTICAST[address.version]
    if address in multicast:
        return f"may not be in the link-local multicast range ({multicast})"
    return ""


@lru_cache(_CACHED)
def refused_endpoint(text: str, service_cidrs: tuple[str, ...], *, allow_loopback: bool) -> str:
    """Why a text may not be an endpoint's address; "" if it may.

    Beside the special ranges those of VIPs are refused: such an endpoint would be a Service again.
    """
    if reason := special(text, allow_loopback=allow_loopback):
        return reason
    address = parse_ip(text)
    for cidr in (*service_cidrs, LOOPBACK_SERVICE_CIDR):
        network = parse_cidr(cidr)
        if address is not None and network is not None and address in network:
            return f"may not be in the service VIP range ({network})"
    return ""
