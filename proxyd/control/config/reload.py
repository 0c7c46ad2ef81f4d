"""Reads the configuration again: what may change at run time is put in force, the rest is logged."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable

import msgspec

from proxyd.control.config.file import Configuration, changes, shown_field
from proxyd.control.config.settings import Settings, SettingsError
from proxyd.control.runtime import logs
from proxyd.control.runtime.logs import get_logger
from proxyd.control.runtime.tasks import cancel, spawn
from proxyd.sources.manifests.watch import watch

log = get_logger("config")

_OF_LOGS = {"verbosity", "log_format", "vmodule", "log_file"}


class Reloading:
    """Reloads when asked. All orders that come during a reload together lead to one more.

    Args:
        reload: reads everything again.
    """

    def __init__(self, reload: Callable[[], Awaitable[None]]) -> None:
        self._reload = reload
        self._asked = False
        self._task: asyncio.Task[None] | None = None

    def ask(self) -> None:
        """Reload soon; does not wait."""
        self._asked = True
        if self._task is None or self._task.done():
            self._task = spawn(self._as_asked(), name="reload")

    async def _as_asked(self) -> None:
        while self._asked:
            self._asked = False
            await self._reload()


class ConfigReload:
    """Reads one daemon's configuration again.

    Args:
        configuration: where its settings come from; None: they never change.
        current: gives the settings in force.
        apply: puts new settings in force, which differ only in what may change at run time.
        valid: is told at each reading whether the configuration is valid.

    Attributes:
        refused: what is wrong with the configuration that was read last; () if it is valid.
    """

    def __init__(
        self,
        configuration: Configuration | None,
        current: Callable[[], Settings],
        apply: Callable[[Settings], None],
        valid: Callable[[bool], None],
    ) -> None:
        self.refused: tuple[str, ...] = ()
        self._configuration = configuration
        self._current = current
        self._apply = apply
        self._valid = valid
        # The lines that were logged last: the same lines are not logged again.
        self._told: tuple[str, ...] = configuration.told if configuration else ()
        self._following: asyncio.Task[None] | None = None

    def follow(self) -> None:
        """Reload whenever the file changes, until `stop`."""
        if self._configuration is not None and self._configuration.path:
            self._following = spawn(self._follow(self._configuration.path), name="config")

    async def stop(self) -> None:
        """Stop following the file."""
        if self._following is not None:
            await cancel(self._following)

    async def reload(self) -> None:
        """Read the configuration, and put in force what can be. One that is not valid changes nothing."""
        configuration = self._configuration
        if configuration is None or not configuration.path:
            return
        try:
            wanted, warnings = await asyncio.to_thread(configuration.load)
        except SettingsError as error:
            self._refuse(error.problems)
            return
        self._valid(True)
        self.refused = ()
        lines = tuple(str(warning) for warning in warnings)
        if lines and self._told != lines:
            for line in lines:
                log.warning(line)
        now, later = changes(self._current(), wanted)
        if now:
            log.info("configuration changed", fields=sorted(map(shown_field, now)))
            values = {field: getattr(wanted, field) for field in now}
            settings = msgspec.structs.replace(self._current(), **values)
            if now & _OF_LOGS:
                _configure_logs(settings)
            self._apply(settings)
        restart = sorted(map(shown_field, later))
        if restart and self._told != (*lines, *restart):
            log.warning(f"restart needed for {', '.join(restart)}")  # noqa: G004 - the line is for people
        self._told = (*lines, *restart)

    async def _follow(self, path: str) -> None:
        async with contextlib.aclosing(watch((path,))) as seen:  # type: ignore[type-var]  # it is a generator
            async for _ in seen:
                await self.reload()

    def _refuse(self, problems: tuple[str, ...]) -> None:
        self._valid(False)
        self.refused = tuple(problems)
        if self._told != problems:
            for problem in problems:
                log.error(problem)
            log.error("the configuration is not valid: the earlier one stays in force")
        self._told = problems


def _configure_logs(settings: Settings) -> None:
    try:
        logs.configure(
            settings.log_format,
            settings.verbosity,
            environ=os.environ,
            rooms=settings.vmodule,
            path=settings.log_file,
        )
    except OSError as error:
        path, why = settings.log_file, error.strerror
        log.error("the log file cannot be opened", path=path, error=why)  # noqa: TRY400 - one line is enough
