"""The streams and environment that a command gets, so that a test can run it in process; and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, TextIO

OK = 0
FAILED = 1
USAGE = 2
INVALID = 3  # the configuration
UNREACHABLE = 4  # the daemon


class CommandError(Exception):
    """Ends a command: the lines that go to standard error, and the exit code."""

    def __init__(self, *lines: str, code: int = FAILED) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.code = code


class Env(NamedTuple):
    """Standard streams and environment of a command. Data goes to `stdout`, messages go to `stderr`."""

    stdout: TextIO
    stderr: TextIO
    environ: Mapping[str, str] = MappingProxyType({})

    @classmethod
    def here(cls) -> Env:
        """The streams and environment of this process."""
        return cls(stdout=sys.stdout, stderr=sys.stderr, environ=os.environ)

    @property
    def colour(self) -> bool:
        """Whether data may be coloured: on a terminal, unless NO_COLOR is set (no-color.org)."""
        dumb = self.environ.get("TERM") == "dumb"
        return self.stdout.isatty() and not self.environ.get("NO_COLOR") and not dumb

    @property
    def width(self) -> int | None:
        """Columns of the terminal that data goes to; None where it goes elsewhere."""
        if not self.stdout.isatty():
            return None
        columns = self.environ.get("COLUMNS", "")
        if columns.isdecimal() and int(columns):
            return max(20, int(columns))
        try:
            return max(20, os.get_terminal_size(self.stdout.fileno()).columns)
        except (OSError, ValueError):
            return None

    def say(self, line: str) -> None:
        """Print a message."""
        print(line, file=self.stderr)
