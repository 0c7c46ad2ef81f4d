"""The handover of an upgrade: what one program gives to the next one in the same process.

An upgrade replaces the program by execve(2). Inheritable descriptors stay open, children stay children, and
the pid stays the same. A memfd says which descriptor is what. New fields of these structs need a default,
because the next program may be newer or older.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from proxyd.api.service import Protocol
from proxyd.control.runtime.logs import get_logger
from proxyd.state.spec import ListenerKey, ServicePortName

log = get_logger("upgrade")

VARIABLE = "PROXYD_HANDOVER"
_CHECK = "check"  # its value if a program is only asked whether it would start
# 2: listening sockets may be parked (`Handover.vip_lookup`). Without these it says 1, for older programs.
_VERSIONS = (1, 2)
_NAME = "proxyd-handover"
_CHECK_SECONDS = 60.0


class UpgradeError(Exception):
    """There is no upgrade, and the running program goes on; the text is one line that says why."""


class ListeningSocket(msgspec.Struct, frozen=True, array_like=True):
    """A listening socket.

    Attributes:
        steered: as in a listener spec.
        further: more addresses of an SCTP endpoint.
        holder: the service port that it is open for; None: a program before this one did not say.
    """

    ip: str
    port: int
    protocol: Protocol
    steered: bool
    descriptor: int
    further: list[str] = []
    holder: ServicePortName | None = None

    @property
    def key(self) -> ListenerKey:
        """What it is bound to."""
        return ListenerKey(self.ip, self.port, self.protocol)

    @property
    def keys(self) -> tuple[ListenerKey, ...]:
        """Everything it is bound to."""
        return tuple(ListenerKey(ip, self.port, self.protocol) for ip in (self.ip, *self.further))


class DrainingWorker(msgspec.Struct, frozen=True, array_like=True):
    """A worker that goes on relaying until its last relay has ended.

    Attributes:
        pid: its process, a child.
        channel: descriptor of control's end of its channel.
        listeners: number, address, port and protocol of each listener that it may have relays of. A listener
            with several addresses (SCTP) has one entry for each.
    """

    pid: int
    channel: int
    listeners: list[tuple[int, str, int, Protocol]] = []


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is handed over."""

    version: int = 1
    program: str = ""  # version of the program that hands over
    admin_path: str = ""
    admin: int = -1  # descriptor of the listening admin socket
    listeners: list[ListeningSocket] = []
    workers: list[DrainingWorker] = []
    vip_lookup: dict[str, int] = {}  # descriptors by name of what `proxyd.host.parked` has

    def descriptors(self) -> Iterable[int]:
        """All descriptors that are handed over, without that of the memfd."""
        yield from (one.descriptor for one in self.listeners)
        yield from (worker.channel for worker in self.workers)
        yield from self.vip_lookup.values()
        if self.admin >= 0:
            yield self.admin


def checking() -> bool:
    """Whether this process is only to find out whether the program would start with these arguments."""
    return os.environ.get(VARIABLE) == _CHECK


def answer() -> str:
    """What such a process prints: it would start, and understands these versions of the handover."""
    return "\n".join(f"{_NAME} {version}" for version in _VERSIONS)


def take() -> Handover | None:
    """What the program before this one handed over; None if there was none.

    If it cannot be read, all inherited descriptors are closed. (This program's own are never inheritable.)
    """
    text = os.environ.pop(VARIABLE, "")
    if not text.isdecimal():
        return None
    left = _inheritable()
    try:
        memory = int(text)
        if not str(Path(f"/proc/self/fd/{memory}").readlink()).startswith(f"/memfd:{_NAME}"):
            return None
    except (OSError, ValueError):
        return None  # somebody else's variable
    try:
        data = os.pread(memory, os.fstat(memory).st_size, 0)
        found = msgspec.msgpack.decode(data, type=Handover)
        _check_version(found)
        for descriptor in found.descriptors():
            os.set_inheritable(descriptor, False)
    except (OSError, ValueError) as error:
        what = "what the program before left can't be read: starting anew"
        log.error(what, error=str(error))  # noqa: TRY400 - one line is enough
        for descriptor in left:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        return None
    os.close(memory)
    return found


def _inheritable() -> list[int]:
    """The descriptors that this program inherited, without the standard streams."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are numbers
        with contextlib.suppress(OSError):
            if (number := int(name)) > 2 and os.get_inheritable(number):
                found.append(number)
    return found


def _check_version(found: Handover) -> None:
    if found.version not in _VERSIONS:
        raise ValueError(f"it is of version {found.version}")


async def check(version: int) -> None:
    """Find out whether the installed program would start with this one's arguments, and can go on from it.

    Args:
        version: of the handover that it would get.

    Raises:
        UpgradeError: it would not start, or cannot go on.
    """
    process = await asyncio.create_subprocess_exec(
        *_command(),
        env={**os.environ, VARIABLE: _CHECK},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_CHECK_SECONDS):
            output, errors = await process.communicate()
    except TimeoutError:
        raise UpgradeError(
            f"the new program did not say within {_CHECK_SECONDS:.0f} s that it would start"
        ) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()  # also where the daemon ends meanwhile: it leaves no process behind
    if process.returncode != 0:
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        why = lines[-1] if lines else f"it ended with status {process.returncode}"
        raise UpgradeError(f"the new program would not start: {why}")
    if f"{_NAME} {version}" not in output.decode("utf-8", "replace").splitlines():
        raise UpgradeError(
            "the new program can't go on from this one, their handovers are of different versions: "
            "restart the daemon"
        )


def replace_program(handover: Handover) -> None:
    """Replace this program by the installed one. Call `hold_signals` first. Does not return.

    Raises:
        OSError: it cannot be executed, or there is no memory.
    """
    memory = os.memfd_create(_NAME)
    os.write(memory, msgspec.msgpack.encode(handover))
    for descriptor in (memory, *handover.descriptors()):
        os.set_inheritable(descriptor, True)
    command = _command()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os.execve(command[0], command, {**os.environ, VARIABLE: str(memory)})  # noqa: S606 - our own program


def _command() -> list[str]:
    return [sys.executable, *sys.orig_argv[1:]]
