"""The demo's backends: `python -m proxyd.cli.backends NAME=IP:PORT ...` answers HTTP with each one's name.

It prints `ready` once all of them listen, or one line about what went wrong. It ends when its standard input
does, and so with the process that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

_TIMEOUT = 10.0


def main(specs: Sequence[str]) -> int:
    """Serve until standard input ends. Returns the exit code."""
    return asyncio.run(_serve(specs))


async def _serve(specs: Sequence[str]) -> int:
    async with contextlib.AsyncExitStack() as stack:
        for spec in specs:
            name, _, address = spec.partition("=")
            host, _, port = address.rpartition(":")
            try:
                server = await asyncio.start_server(_answer(name), host, int(port))
            except OSError as error:
                print(
                    f"backend {name} cannot listen on {address}: {os.strerror(error.errno or 0).lower()}",
                    flush=True,
                )
                return 1
            await stack.enter_async_context(server)
        print("ready", flush=True)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
        await ended.wait()
    return 0


def _answer(name: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = f"hello from {name}\n".encode()
        head = (
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        with contextlib.suppress(OSError, EOFError, asyncio.LimitOverrunError, TimeoutError):
            async with asyncio.timeout(_TIMEOUT):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(head.encode() + body)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    return answer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
