"""The one way to start an asyncio task: it is kept, it has a name, and its failure is logged."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from proxyd.control.runtime.logs import get_logger
from proxyd.control.runtime.signal_mask import block_daemon_signals

_T = TypeVar("_T")
_log = get_logger("tasks")
# The event loop has only weak references to tasks: without this set a task may vanish while it waits.
_running: set[asyncio.Task[Any]] = set()


def spawn(
    coro: Coroutine[Any, Any, _T],
    *,
    name: str,
    on_failure: Callable[[BaseException], None] | None = None,
) -> asyncio.Task[_T]:
    """Start a task.

    An exception that ends it is logged in one line, even if the task is awaited. Cancelling is no failure.

    Args:
        coro: what to run.
        name: reads well in a dump, such as `source:manifests`.
        on_failure: called with the exception, for a task that the daemon cannot do without.
    """
    task = asyncio.get_running_loop().create_task(coro, name=name)
    _running.add(task)

    def done(ended: asyncio.Task[_T]) -> None:
        _running.discard(ended)
        if ended.cancelled():
            return
        error = ended.exception()
        if error is None:
            return
        _log.error("task failed", task=name, error=describe(error))
        if on_failure is not None:
            on_failure(error)

    task.add_done_callback(done)
    return task


async def in_thread(work: Callable[..., _T], *args: object) -> _T:
    """Like `asyncio.to_thread`, but the program ends without waiting for the work, whose result is then lost.

    For work that only reads, so that the daemon stops promptly in the middle of it.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():
            return  # the waiting task was cancelled
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]  # without an error there is a result
        else:
            future.set_exception(error)

    def run() -> None:
        block_daemon_signals()
        result, failed = None, None
        try:
            result = work(*args)
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
            failed = error
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(settle, result, failed)
        failed = None  # a cycle: the traceback refers to this frame

    threading.Thread(target=run, name=getattr(work, "__name__", "work"), daemon=True).start()
    return await future


def describe(error: BaseException) -> str:
    """An exception in one line: its type, its text and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}".replace("\n", " ")


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended; their failures were logged already."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
