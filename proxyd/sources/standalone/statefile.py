"""The state file keeps allocations between runs, as JSON; it is replaced atomically."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import stat
from pathlib import Path

import msgspec

from proxyd.api.meta import ObjectName
from proxyd.sources.manifests.files import display, reason
from proxyd.sources.standalone.allocation import Allocation, Allocations

VERSION = 1
# 10,000 Services take about 2 MB.
MAX_BYTES = 64 << 20


class _Header(msgspec.Struct):
    version: int


class _Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The file's content; `services` is by "namespace/name"."""

    version: int
    services: dict[str, Allocation] = {}


def load_allocations(path: str) -> tuple[Allocations, str]:
    """The allocations in the file, and one line for the operator or "".

    Where there is no file there are none. A file that is damaged, or of another version, is moved to
    `<path>.bad`, and one that cannot be read stays where it is: both count as empty.
    """
    try:
        return _decode(_read(path)), ""
    except FileNotFoundError:
        return Allocations(), ""
    except OSError as error:
        return Allocations(), f"{display(path)}: {reason(error)}: allocations start afresh"
    except ValueError as error:
        return Allocations(), _set_aside(path, str(error))


def save_allocations(path: str, allocations: Allocations) -> str:
    """Replaces the file. Returns "", or why that failed, in one line for the operator.

    When this returns the file is complete on disk, with mode 0600. Its folder is made, with mode 0700.
    """
    try:
        _replace(Path(path), _encode(allocations))
    except (OSError, ValueError) as error:
        return f"{display(path)}: not saved ({reason(error)}): allocations may differ after a restart"
    return ""


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("is not a file")
        if info.st_size > MAX_BYTES:
            raise ValueError(f"is over {MAX_BYTES >> 20} MiB")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_BYTES)
    finally:
        os.close(descriptor)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The name is always the same, so that interrupted saves leave one file behind and not many.
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _set_aside(path: str, why: str) -> str:
    bad = f"{path}.bad"
    try:
        Path(path).replace(bad)
    except OSError as error:
        return f"{display(path)}: {why}; it cannot be moved aside ({reason(error)}): allocations start afresh"
    return f"{display(path)}: {why}: moved to {display(bad)}, allocations start afresh"


def _encode(allocations: Allocations) -> bytes:
    services = {str(name): entry for name, entry in sorted(allocations.services.items())}
    return (
        msgspec.json.format(msgspec.json.encode(_Document(version=VERSION, services=services)), indent=1)
        + b"\n"
    )


def _decode(data: bytes) -> Allocations:
    """The allocations in the content of a file; raises ValueError with what is wrong in a few words."""
    try:
        version = msgspec.json.decode(data, type=_Header).version
        if version != VERSION:
            raise ValueError(f"is of version {version}, this proxyd writes {VERSION}")
        document = msgspec.json.decode(data, type=_Document)
    except msgspec.MsgspecError as error:
        raise ValueError(f"is damaged ({error})") from None
    except UnicodeDecodeError:
        raise ValueError("is damaged (not UTF-8)") from None
    services = {}
    for name, entry in document.services.items():
        namespace, slash, own = name.partition("/")
        if not (namespace and slash and own) or "/" in own:
            raise ValueError(f"is damaged ({name!r} is not namespace/name)")
        for address in entry.cluster_ips:
            if not _canonical(address):
                raise ValueError(f"is damaged ({name}: {address!r} is not an IP address)")
        for key, number in entry.node_ports.items():
            if "/" not in key or not 1 <= number <= 65535:
                raise ValueError(f"is damaged ({name}: nodePort {key!r}: {number})")
        services[ObjectName(namespace, own)] = entry
    return Allocations(services=services)


def _canonical(address: str) -> bool:
    try:
        return str(ipaddress.ip_address(address)) == address
    except ValueError:
        return False
