"""The definition of one flag."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

Kind = Literal["value", "repeat", "switch", "count"]


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """One flag of `proxyd run` that is a setting.

    `parse` turns the flag's text (the list of its texts, if it is repeatable) into the field's value, and
    raises ValueError with what was expected. `default` is the text of the help. With `blank` an empty text
    means the default. `kube` means that kube-proxy has the flag too: under that name, what kube-proxy ignores
    beside --config is ignored.
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
