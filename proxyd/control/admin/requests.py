"""Requests of the admin API to values, values to answers; and the requests that need no daemon."""

from __future__ import annotations

import math
import os
import platform
from typing import Any

import msgspec
from aiohttp import web

from proxyd import __version__
from proxyd.control.admin.schema import NO_SUCH_PATH, LogLevelView, Refusal, VersionView
from proxyd.control.admin.selector import Selector, SelectorError
from proxyd.control.runtime import logs
from proxyd.control.runtime.logs import get_logger

log = get_logger("admin")

MAX_BODY = 16 * 1024  # of a request


async def show_version(request: web.Request) -> web.Response:
    """Answer with the version of this program."""
    parameters(request)
    return answered(VersionView(version=__version__, python=platform.python_version(), pid=os.getpid()))


async def show_log_level(request: web.Request) -> web.Response:
    """Answer with the log level."""
    parameters(request)
    return answered(LogLevelView(level=logs.level()))


async def set_log_level(request: web.Request) -> web.Response:
    """Set the log level."""
    parameters(request)
    try:
        wanted = msgspec.json.decode(await request.read(), type=LogLevelView).level
        logs.set_level(wanted)
    except msgspec.DecodeError as error:
        raise web.HTTPBadRequest(text=f'expected {{"level": "info"}}: {error}') from None
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from None
    log.info("log level set", to=wanted)
    return answered(LogLevelView(level=logs.level()))


def parameters(request: web.Request, *known: str) -> dict[str, str]:
    """The parameters of a request.

    Raises:
        web.HTTPBadRequest: one is unknown or given twice.
    """
    for key in request.query:
        if key not in known:
            offer = f"known are {', '.join(known)}" if known else "there are none here"
            raise web.HTTPBadRequest(text=f'unknown parameter "{key[:60]}"; {offer}')
        if len(request.query.getall(key)) > 1:
            raise web.HTTPBadRequest(text=f'parameter "{key}" is given twice')
    return dict(request.query)


def selector_of(query: dict[str, str]) -> Selector:
    """The label selector of a request.

    Raises:
        web.HTTPBadRequest: it can't be read.
    """
    try:
        return Selector(query.get("labelSelector", ""))
    except SelectorError as error:
        raise web.HTTPBadRequest(text=str(error)) from None


def seconds_of(query: dict[str, str], key: str, default: float) -> float:
    """A parameter that is a number of seconds.

    Raises:
        web.HTTPBadRequest: it is not a number from 0 to 86400.
    """
    text = query.get(key)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 86400:
        raise web.HTTPBadRequest(text=f'{key}: expected seconds from 0 to 86400, got "{text}"')
    return seconds


def answered(value: Any, status: int = 200) -> web.Response:
    """A value as JSON."""
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


def refusal(
    status: int, why: str, headers: dict[str, str] | None = None, *, reason: str = ""
) -> web.Response:
    """An error as JSON; see `Refusal`."""
    return web.Response(
        status=status,
        body=msgspec.json.encode(Refusal(error=why, reason=reason)),
        content_type="application/json",
        headers=headers,
    )


def explained(request: web.Request, error: web.HTTPException) -> web.Response:
    """The answer for an error that a handler, or aiohttp itself, has raised."""
    path = request.path[:200]
    if error.status == 405:
        why = f"{request.method[:20]} is not possible for {path}"
        return refusal(405, why, {"Allow": error.headers["Allow"]})
    if error.status == 404 and request.match_info.route.resource is None:
        return refusal(404, f"no path {path}; see docs/admin-api.md", reason=NO_SUCH_PATH)
    if error.status == 413:
        return refusal(413, f"a body has at most {MAX_BODY} bytes")
    return refusal(error.status, error.text or error.reason)


async def sign(_request: web.Request, response: web.StreamResponse) -> None:
    """Add the header by which a client knows that it talks to proxyd."""
    response.headers["Server"] = f"proxyd/{__version__}"
