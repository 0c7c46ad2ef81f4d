"""Connection records: one line for each finished connection."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO

import msgspec

from proxyd.control.logs import get_logger
from proxyd.relay.messages import Connection

log = get_logger("access")


class AccessLog:
    """Writes connection records to a file as JSON lines, or to standard output ("-")."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._encoder = msgspec.json.Encoder()
        self._file: IO[bytes] | None = None
        self._failing = False
        self.dropped = 0
        self.reopen()

    def reopen(self) -> None:
        """Open the file anew, after it was rotated. Without success records are dropped, and it is said once."""
        if not self._path or self._path == "-":
            return
        self.close()
        try:
            self._file = Path(self._path).open("ab", buffering=0)  # noqa: SIM115 - kept open
        except OSError as error:
            self._fail(error)

    def write(self, records: list[Connection], dropped: int = 0) -> None:
        """Write records. `dropped` more were lost on the way here."""
        self.dropped += dropped
        if self._path == "-":
            readable = sys.stdout.isatty()
            sys.stdout.write("".join(self._line(r) if readable else self._json(r).decode() for r in records))
            sys.stdout.flush()
            return
        if self._file is None:
            self.dropped += len(records)
            return
        try:
            self._file.write(b"".join([self._json(record) for record in records]))
            self._failing = False
        except OSError as error:
            self.dropped += len(records)
            self._fail(error)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _fail(self, error: OSError) -> None:
        if not self._failing:
            log.error(
                "access log can't be written: records are dropped", path=self._path, error=error.strerror
            )
        self._failing = True

    def _json(self, record: Connection) -> bytes:
        return self._encoder.encode(msgspec.structs.asdict(record)) + b"\n"

    def _line(self, record: Connection) -> str:
        return (
            f"{record.service}  {record.client} -> {record.frontend} -> {record.endpoint or 'no endpoint'}  "
            f"{record.bytes_in} B in  {record.bytes_out} B out  {record.seconds:.3f} s  {record.reason}\n"
        )
