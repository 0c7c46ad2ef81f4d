"""Logs: lines for people on a terminal, JSON elsewhere; repeated failures are logged once, then counted."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol, TextIO, cast

import msgspec

# structlog imports rich, where it is installed, for tracebacks that are never printed: 0.1 s of every start.
_hide_rich = "rich" not in sys.modules
if _hide_rich:
    sys.modules["rich"] = None  # type: ignore[assignment]  # importing it fails, as if it were not installed
import structlog  # noqa: E402 - see above

if _hide_rich:
    del sys.modules["rich"]


class Log(Protocol):
    """A logger: it takes an event in plain words, and its facts as fields."""

    def debug(self, event: str, **fields: Any) -> None:
        """Log what helps to find a fault in proxyd."""

    def info(self, event: str, **fields: Any) -> None:
        """Log what changed."""

    def warning(self, event: str, **fields: Any) -> None:
        """Log what an operator may want to mend."""

    def error(self, event: str, **fields: Any) -> None:
        """Log what does not work."""


def get_logger(room: str) -> Log:
    """A logger whose lines name the room that they come from. It may be made before `configure`."""
    return cast("Log", structlog.get_logger(room=room))


def silent() -> logging.Logger:
    """A logger that drops everything, for libraries that would log every mistake of a client."""
    logger = logging.getLogger("proxyd.silent")
    logger.disabled = True
    return logger


# klog's levels from this one on are for finding faults.
DEBUG_VERBOSITY = 4
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_level = "info"
_rooms: tuple[tuple[str, int], ...] = ()  # patterns of rooms that have a klog level of their own


def level() -> str:
    """The lowest level that is logged: debug, info, warning or error."""
    return _level


def set_level(name: str) -> None:
    """Log this level and all above it, until the next `configure`.

    Raises:
        ValueError: there is no such level.
    """
    global _level  # noqa: PLW0603 - as the logging it describes, one for the process
    if name not in LEVELS:
        raise ValueError(f'log level: expected {", ".join(LEVELS)}, got "{name[:60]}"')
    _level = name
    usual: Any = structlog.make_filtering_bound_logger(LEVELS[name])
    if not _rooms:
        structlog.configure(wrapper_class=usual)
        return
    rooms = _rooms
    debug: Any = structlog.make_filtering_bound_logger(logging.DEBUG)

    def of_a_room(logger: Any, processors: Any, context: dict[str, Any]) -> Any:
        level = next((n for pattern, n in rooms if fnmatchcase(str(context.get("room")), pattern)), 0)
        chosen = debug if level >= DEBUG_VERBOSITY else usual
        return chosen(logger, processors, context)

    structlog.configure(wrapper_class=cast("Any", of_a_room))


def configure(
    log_format: str = "auto",
    verbosity: int = 0,
    *,
    stream: TextIO | None = None,
    environ: Mapping[str, str] | None = None,
    rooms: Sequence[tuple[str, int]] = (),
    path: str = "",
) -> None:
    """Set up logging for the process. It may be called again.

    Methods below the level are prebuilt no-ops.

    Args:
        log_format: `console`, `json`, or `auto`: console where the stream is a terminal.
        verbosity: 0 for info, 1 and more for debug.
        stream: where lines go; standard error by default.
        environ: asked for NO_COLOR.
        rooms: patterns of rooms, of which the first that matches counts, and their klog level: 4 and more for
            debug.
        path: a file that lines go to instead of the stream; "" for none.

    Raises:
        OSError: the file cannot be opened.
    """
    global _rooms, _file  # noqa: PLW0603 - as the logging they describe, one for the process
    if path != (_file.path if _file else ""):
        old, _file = _file, _File(path) if path else None
        if old is not None:
            old.close()
    _rooms = tuple(rooms)
    out: TextIO | _File = _file or (sys.stderr if stream is None else stream)
    terminal = out.isatty()
    console = log_format == "console" or (log_format == "auto" and terminal)
    processors: list[Any] = [structlog.processors.add_log_level]
    if console:
        colours = terminal and not (environ or {}).get("NO_COLOR")
        processors += [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            _drop_room,
            structlog.dev.ConsoleRenderer(
                colors=colours,
                pad_event_to=0,
                pad_level=False,
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    else:
        processors += [
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.format_exc_info,
            _json,
        ]
    structlog.configure(
        processors=processors,
        logger_factory=lambda *_: _LineWriter(out),
        # Loggers are made when modules are imported; caching would freeze the first configuration.
        cache_logger_on_first_use=False,
    )
    set_level("debug" if verbosity > 0 else "info")


def reopen() -> None:
    """Open the file of --log-file anew, as after its rotation."""
    if _file is not None:
        _file.reopen()


class _File:
    """A file that is appended to, whole lines at a time.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._out = self._open()

    def _open(self) -> io.FileIO:
        # Not readable for all, as lines name clients. Unbuffered, so that each line is there at once.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        return io.FileIO(descriptor, "a")

    def isatty(self) -> bool:
        return False

    def write(self, line: str) -> None:
        self._out.write(line.encode("utf-8", "replace"))

    def flush(self) -> None:
        """Nothing is kept back."""

    def reopen(self) -> None:
        # If that fails, the old file stays in use.
        with contextlib.suppress(OSError):
            old, self._out = self._out, self._open()
            old.close()

    def close(self) -> None:
        self._out.close()


_file: _File | None = None


class _LineWriter:
    """Writes each line with one call, so that the lines of processes that share the stream do not mix."""

    def __init__(self, out: TextIO | _File) -> None:
        self._out = out

    def msg(self, line: str) -> None:
        try:
            self._out.write(line + "\n")
            self._out.flush()
        except (OSError, ValueError):
            # A log that nobody reads any more is no reason to stop serving.
            return

    debug = info = warning = warn = error = critical = exception = log = msg


def _drop_room(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event.pop("room", None)
    return event


def _json(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    first = {name: event.pop(name, "") for name in ("time", "level", "event")}
    return msgspec.json.encode({**first, **event}, enc_hook=str).decode()


def log_some(
    say: Callable[..., None], event: str, lines: Sequence[Mapping[str, Any]], most: int = 20
) -> None:
    """Log what happened to many things at once: `most` lines, and how many more there are.

    One line of each error comes first, so that none is hidden behind many others.

    Args:
        say: a method of a logger.
        event: what happened to each.
        lines: the fields of each line.
        most: how many lines are written.
    """
    if len(lines) > most:
        first: dict[object, Mapping[str, Any]] = {}
        others = [fields for fields in lines if first.setdefault(fields.get("error"), fields) is not fields]
        lines = [*first.values(), *others]
    for fields in lines[:most]:
        say(event, **fields)
    if len(lines) > most:
        say(event, more=len(lines) - most)


class _Repeat:
    """What is known of one kind of failure."""

    __slots__ = ("count", "event", "fields", "last", "method", "said")

    def __init__(self, method: str, now: float) -> None:
        self.method = method
        self.said = self.last = now
        self.count = 0  # since it was last said
        self.event = ""
        self.fields: dict[str, Any] = {}


class Summariser:
    """Logs a failure once, and while it goes on, how often it happened, at most every `interval` seconds.

    Args:
        log: takes the lines.
        interval: seconds between two lines of one key.
        max_keys: how many kinds of failure are distinguished; all further ones are one kind.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        log: Log,
        *,
        interval: float = 30.0,
        max_keys: int = 1000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._interval = interval
        self._max_keys = max_keys
        self._clock = clock
        self._repeats: dict[str, _Repeat] = {}

    def __len__(self) -> int:
        return len(self._repeats)

    def warning(self, key: str, event: str, *, count: int = 1, **fields: Any) -> None:
        """Report `count` failures of one kind; `fields` describe the last of them."""
        self._report("warning", key, event, count, fields)

    def error(self, key: str, event: str, *, count: int = 1, **fields: Any) -> None:
        """Like `warning`, as an error."""
        self._report("error", key, event, count, fields)

    def clear(self, key: str) -> None:
        """Forget a kind of failure that was mended: the next one is logged at once."""
        repeat = self._repeats.pop(key, None)
        if repeat is not None:
            self._say(repeat, self._clock())

    def flush(self, *, everything: bool = False) -> None:
        """Log the counts that are due, and forget kinds that have been quiet. Call it now and then.

        Args:
            everything: log counts that are not due too, as at exit.
        """
        now = self._clock()
        for key, repeat in list(self._repeats.items()):
            if everything or now - repeat.said >= self._interval:
                self._say(repeat, now)
            if everything or now - repeat.last >= self._interval:
                del self._repeats[key]

    async def flush_every(self, seconds: float) -> None:
        """Flush now and then, until it is cancelled."""
        while True:
            await asyncio.sleep(seconds)
            self.flush()

    def _report(self, method: str, key: str, event: str, count: int, fields: dict[str, Any]) -> None:
        now = self._clock()
        repeat = self._repeats.get(key)
        if repeat is None and len(self._repeats) >= self._max_keys:
            self.flush()
            if len(self._repeats) >= self._max_keys:
                key, event, fields = "", "further failures of many kinds", {"last": event}
                repeat = self._repeats.get(key)
        if repeat is None:
            repeat = self._repeats[key] = _Repeat(method, now)
            if count > 1:
                fields = {**fields, "count": count}
            getattr(self._log, method)(event, **fields)
            return
        repeat.count += count
        repeat.last = now
        repeat.event, repeat.fields = event, fields
        if now - repeat.said >= self._interval:
            self._say(repeat, now)

    def _say(self, repeat: _Repeat, now: float) -> None:
        if repeat.count:
            seconds = round(now - repeat.said)
            again = {**repeat.fields, "count": repeat.count, "seconds": seconds}
            getattr(self._log, repeat.method)(repeat.event, **again)
            repeat.count = 0
        repeat.said = now
