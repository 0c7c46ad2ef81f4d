"""Splits a file's bytes into YAML or JSON documents; each can tell the line and column of its fields."""

from __future__ import annotations

import codecs
from collections.abc import Container, Iterable, Iterator

from proxyd.api.findings import Path
from proxyd.sources.text import json_reader, yaml_positions, yaml_reader
from proxyd.sources.text.yaml_reader import Unreadable, line_and_column

__all__ = ["MAX_BYTES", "Document", "Unreadable", "read_documents"]

# A larger file is not read.
MAX_BYTES = 64 * 1024 * 1024
# Documents of one file after this many are not read.
MAX_DOCUMENTS = 100_000

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Document:
    """One document of a file: its value, and where things in it are.

    Attributes:
        value: maps, lists and scalars. YAML aliases share parts of it: do not change it.
    """

    __slots__ = ("_end", "_json", "_line", "_start", "_text", "value")

    def __init__(self, value: object, text: str, start: int, end: int, line: int, *, is_json: bool) -> None:
        self.value = value
        self._text, self._start, self._end, self._line, self._json = text, start, end, line, is_json

    @property
    def all_text(self) -> str:
        """The text of the whole file."""
        return self._text

    @property
    def start(self) -> int:
        """Offset of the document in the file's text."""
        return self._start

    @property
    def text(self) -> str:
        """The document's own text."""
        return self._text[self._start : self._end]

    def positions(self, paths: Iterable[Path]) -> list[tuple[int, int]]:
        """Line and column, from 1, of the value at each path, or of the nearest value above it that exists.

        The text is read once more for that: positions are not kept.
        """
        if self._json:
            return json_reader.positions(self._text, self._start, paths)
        return yaml_positions.positions(self._text[self._start : self._end], self._line, paths)


def read_documents(
    data: bytes | str,
    *,
    is_json: bool = False,
    known: Container[str] = (),
    repeated: list[Unreadable] | None = None,
) -> Iterator[Document | Unreadable]:
    """Yields each document of a file, in order, or an Unreadable in its place; nothing for an empty one.

    YAML is read by version 1.2 (core schema), with merge keys, in UTF-8, or in UTF-16 with a byte order mark.

    Args:
        data: the file's content, or its text as `text_of` gives it.
        is_json: whether the file holds JSON.
        known: texts of YAML documents whose value the caller has: they are yielded with the value None.
        repeated: makes the reading of YAML lenient: of equal keys in a map the last one counts, and each of
            the others is added to this list.
    """
    try:
        text = text_of(data) if isinstance(data, bytes) else data
    except Unreadable as error:
        yield error
        return
    if is_json:
        try:
            for value, start, end in json_reader.read_all(text):
                yield Document(value, text, start, end, 0, is_json=True)
        except Unreadable as error:
            yield error
        return
    for number, (start, end, line) in enumerate(yaml_reader.split(text)):
        if number >= MAX_DOCUMENTS:
            yield Unreadable(f"more than {MAX_DOCUMENTS} documents: split the file", line + 1, 1)
            return
        part = text[start:end]
        if part in known:
            yield Document(None, text, start, end, line, is_json=False)
            continue
        try:
            value = (
                yaml_reader.read(part, line)
                if repeated is None
                else yaml_reader.read_fully(part, line, repeated)
            )
        except Unreadable as error:
            yield error
        else:
            if value is not None:
                yield Document(value, text, start, end, line, is_json=False)


def text_of(data: bytes) -> str:
    """The text of a file; its line ends become line feeds.

    Raises:
        Unreadable: the file is not text, or too large.
    """
    if len(data) > MAX_BYTES:
        raise Unreadable(f"the file has more than {MAX_BYTES >> 20} MiB: split it", 0, 0)
    encoding = "utf-16" if data.startswith(_UTF16) else "utf-8"
    data = data.removeprefix(codecs.BOM_UTF8)
    if encoding == "utf-8" and b"\0" in data:
        raise Unreadable("the file is not text: it has NUL bytes", 0, 0)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-16":
            raise Unreadable("not valid UTF-16: save the file as UTF-8", 0, 0) from None
        before = data[: error.start].decode()
        raise Unreadable(
            f"not valid UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8",
            *line_and_column(before, len(before)),
        ) from None
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text
