"""The forms of names in Kubernetes. Each check returns why a text is not such a name, or ""."""

from __future__ import annotations

import re

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_PORT_NAME = re.compile(r"(?=[-0-9]*[a-z])[a-z0-9]+(-[a-z0-9]+)*")

MAX_SUBDOMAIN = 253
MAX_PORT_NAME = 15


def not_dns1035_label(text: str) -> str:
    """Names of Services."""
    if _LABEL.fullmatch(text) and text[0].isalpha():
        return ""
    return 'use 1-63 of a-z, 0-9 and "-", with a letter first and no "-" at the end'


def not_dns1123_label(text: str) -> str:
    """Namespaces and port names."""
    return "" if _LABEL.fullmatch(text) else 'use 1-63 of a-z, 0-9 and "-", with no "-" first or last'


def not_dns1123_subdomain(text: str) -> str:
    """Names of most other objects, and host names."""
    if len(text) <= MAX_SUBDOMAIN and _SUBDOMAIN.fullmatch(text):
        return ""
    allowed = f'at most {MAX_SUBDOMAIN} of a-z, 0-9, "-" and "."'
    return f"use {allowed}, with a letter or digit at both ends of each part"


def not_port_name(text: str) -> str:
    """Names of container ports, which a targetPort may refer to (IANA service names)."""
    if len(text) <= MAX_PORT_NAME and _PORT_NAME.fullmatch(text):
        return ""
    if text.isascii() and text.isdigit():
        return "write a port number without quotes"
    return (
        f'use 1-{MAX_PORT_NAME} of a-z, 0-9 and single "-", with a letter among them and no "-" first or last'
    )
