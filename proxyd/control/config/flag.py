"""What is known of one flag."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

Kind = Literal["value", "repeat", "switch", "count"]


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """One flag of `proxyd run` that is a setting.

    `parse` turns its text, or the list of its texts where it is repeatable, into the field's value and raises
    ValueError with what was expected. `default` is what the help says. With `blank` an empty text means the default.
    `kube` tells that kube-proxy has it too: what it ignores beside --config is ignored where it is replaced.
    """

    name: str
    metavar: str
    help: str
    default: str
    parse: Callable[[Any], Any]
    kind: Kind = "value"
    short: str = ""
    kube: bool = False
    blank: bool = False

    @property
    def field(self) -> str:
        """The name of the settings field."""
        return self.name.replace("-", "_")
