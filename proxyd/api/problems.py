"""Problems of objects and files; each is one line of text."""

from __future__ import annotations

import enum

import msgspec


class Severity(enum.StrEnum):
    """How bad a problem is. An object with an error is left out; one with a warning is served."""

    ERROR = "error"
    WARNING = "warning"


class Problem(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """One thing that is wrong.

    `kind` and `object` say what it is about, `subject` says both in one text and need not be given. `path` is
    the field path (`spec.ports[0].port`), "" for the object as a whole. `file`, `line` and `column` (from 1;
    0 unknown) say where it was read.
    """

    file: str = ""
    line: int = 0
    column: int = 0
    severity: Severity = Severity.ERROR
    subject: str = ""  # "Service prod/web"; "" where the document could not be read as an object
    path: str = ""
    message: str = ""
    kind: str = ""  # "Service"
    object: str = ""  # "prod/web"; "" where the object does not say its name

    def __post_init__(self) -> None:
        if not self.subject:
            msgspec.structs.force_setattr(self, "subject", " ".join(filter(None, (self.kind, self.object))))

    def __str__(self) -> str:
        where = ":".join([self.file, *(str(n) for n in (self.line, self.column) if n)]) if self.file else ""
        what = ": ".join(part for part in (self.subject, self.path, self.message) if part)
        return f"{where}: {self.severity}: {what}" if where else f"{self.severity}: {what}"
