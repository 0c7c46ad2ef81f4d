"""What commands print beside tables: JSON and YAML."""

from __future__ import annotations

from typing import Any

import msgspec


def json_text(value: Any) -> str:
    """JSON, indented by two spaces, with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


def json_line(value: Any) -> str:
    """JSON in one line."""
    return msgspec.json.encode(value).decode() + "\n"


def yaml_text(value: Any) -> str:
    """YAML, in the order of the fields."""
    from yaml import CSafeDumper, dump  # noqa: PLC0415 - 20 ms that other outputs need not wait for

    plain = msgspec.json.decode(msgspec.json.encode(value))
    return dump(plain, Dumper=CSafeDumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
