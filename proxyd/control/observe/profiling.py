"""What --profiling adds to the metrics server: stacks, tasks and profiles of control, at /debug/."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from types import FrameType

from aiohttp import web

INTERVAL = 0.01  # seconds between two samples of a profile
MAX_SECONDS = 120.0
_DEFAULT_SECONDS = 30.0
_MAX_STACKS = 10_000  # different ones of one profile; further ones are counted together
_MAX_DEPTH = 200

_INDEX = """\
/debug/stacks                what every thread and every task of control does at this moment
/debug/profile?seconds=30    where its threads spend their time, sampled every 10 ms: a line for each stack,
                             `outer;inner count`, as flame graph programs read it
"""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def routes() -> Mapping[str, Handler]:
    """The handlers below /debug/, by path."""
    profiler = _Profiler()
    return {
        "/debug/": _index,
        "/debug/pprof/": _index,  # where kube-proxy has it
        "/debug/stacks": _stacks,
        "/debug/profile": profiler.profile,
        "/debug/pprof/profile": profiler.profile,
    }


async def _index(_request: web.Request) -> web.Response:
    return web.Response(text=_INDEX)


async def _stacks(_request: web.Request) -> web.Response:
    lines = []
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():  # noqa: SLF001 - the documented way to see threads
        lines += [f"thread {names.get(ident, ident)}:\n", *traceback.format_stack(frame), "\n"]
    for task in sorted(asyncio.all_tasks(), key=asyncio.Task.get_name):
        lines.append(f"task {task.get_name()}:\n")
        for inner in task.get_stack(limit=_MAX_DEPTH):
            lines += traceback.format_stack(inner, limit=1)
        lines.append("\n")
    return web.Response(text="".join(lines))


class _Profiler:
    """Takes one profile at a time."""

    def __init__(self) -> None:
        self._busy = False

    async def profile(self, request: web.Request) -> web.Response:
        try:
            seconds = float(request.query.get("seconds", _DEFAULT_SECONDS))
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= MAX_SECONDS:
            raise web.HTTPBadRequest(text=f"seconds: expected a number over 0, to {MAX_SECONDS:.0f}\n")
        if self._busy:
            raise web.HTTPConflict(text="a profile is being taken: try again when it is done\n")
        self._busy = True
        try:
            stacks = await asyncio.to_thread(_sample, seconds)
        finally:
            self._busy = False
        lines = (f"{stack} {count}\n" for stack, count in stacks.most_common())
        return web.Response(text="".join(lines))


def _sample(seconds: float) -> Counter[str]:
    """How often each stack of the other threads was seen."""
    me = threading.get_ident()
    seen: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for ident, frame in sys._current_frames().items():  # noqa: SLF001 - as above
            if ident != me:
                stack = _collapsed(frame)
                seen[stack if stack in seen or len(seen) < _MAX_STACKS else "other"] += 1
        time.sleep(INTERVAL)
    return seen


def _collapsed(frame: FrameType | None) -> str:
    names: list[str] = []
    while frame is not None and len(names) < _MAX_DEPTH:
        names.append(f"{frame.f_globals.get('__name__', '?')}:{frame.f_code.co_name}")
        frame = frame.f_back
    return ";".join(reversed(names))
