"""The system call bpf(2): maps, programs and links, which are file descriptors, and pins (linux/bpf.h)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
from pathlib import Path

# asm/unistd.h of each architecture
_NUMBERS = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "ppc64le": 361,
    "ppc64": 361,
    "s390x": 351,
    "i386": 357,
    "i686": 357,
    "armv7l": 386,
    "armv6l": 386,
}
_NUMBER = _NUMBERS.get(platform.machine(), -1)
_libc = ctypes.CDLL(None, use_errno=True)

# enum bpf_cmd
_MAP_CREATE, _MAP_LOOKUP_ELEM, _MAP_UPDATE_ELEM, _MAP_DELETE_ELEM, _MAP_GET_NEXT_KEY = range(5)
_PROG_LOAD, _OBJ_PIN, _OBJ_GET = 5, 6, 7
_LINK_CREATE, _LINK_UPDATE, _LINK_DETACH = 28, 29, 34

# enum bpf_map_type
HASH, SOCKHASH = 1, 18
NO_PREALLOC = 1  # BPF_F_NO_PREALLOC: memory is used by entry, not at once
# enum bpf_prog_type, enum bpf_attach_type
SK_LOOKUP, ATTACH_SK_LOOKUP = 30, 36

_LOG_BYTES = 1 << 16
_NAME_BYTES = 15
_LICENSE = b"Dual MIT/GPL\0"


class BpfError(OSError):
    """The kernel refused. `strerror` is one line: what was refused, and why."""

    def __init__(self, what: str, number: int, said: str = "") -> None:
        reason = said or os.strerror(number)
        super().__init__(number, f"{what}: {reason}")


def create_map(
    kind: int, key_bytes: int, value_bytes: int, entries: int, *, name: str, flags: int = 0
) -> int:
    """Make a map. Returns its descriptor.

    Args:
        kind: HASH or SOCKHASH.
        key_bytes: of every key.
        value_bytes: of every value; 4 or 8 for a SOCKHASH, whose values are descriptors of sockets.
        entries: at most.
        name: as `bpftool map` shows it, 15 characters at most.
        flags: NO_PREALLOC, which a HASH may have.

    Raises:
        BpfError: EPERM without CAP_BPF; a SOCKHASH needs CAP_NET_ADMIN too.
    """
    attributes = struct.pack(
        "=IIIIIII16s", kind, key_bytes, value_bytes, entries, flags, 0, 0, name.encode()[:_NAME_BYTES]
    )
    return _call(f"BPF map {name}", _MAP_CREATE, attributes)


def update(map_: int, key: bytes, value: bytes) -> None:
    """Put an entry into a map, in the place of one with the same key.

    Raises:
        BpfError: E2BIG where the map is full.
    """
    with _buffers(key, value) as (key_at, value_at):
        _call("BPF map entry", _MAP_UPDATE_ELEM, struct.pack("=IxxxxQQQ", map_, key_at, value_at, 0))


def delete(map_: int, key: bytes) -> bool:
    """Take an entry out of a map. Returns whether there was one.

    Raises:
        BpfError: whatever else went wrong.
    """
    with _buffers(key) as (key_at,):
        try:
            _call("BPF map entry", _MAP_DELETE_ELEM, struct.pack("=IxxxxQQQ", map_, key_at, 0, 0))
        except BpfError as error:
            # A SOCKHASH says EINVAL for a key that it does not have on some kernels.
            if error.errno in (errno.ENOENT, errno.EINVAL):
                return False
            raise
    return True


def keys(map_: int, key_bytes: int) -> list[bytes]:
    """Every key of a map.

    Raises:
        BpfError: not a map.
    """
    found: list[bytes] = []
    after = ctypes.create_string_buffer(key_bytes)
    last = 0  # none: the kernel gives the first key
    while True:
        arguments = struct.pack("=IxxxxQQQ", map_, last, ctypes.addressof(after), 0)
        try:
            _call("BPF map", _MAP_GET_NEXT_KEY, arguments)
        except BpfError as error:
            if error.errno == errno.ENOENT:
                return found
            raise
        found.append(after.raw)
        last = ctypes.addressof(after)


def load_program(kind: int, attach: int, instructions: bytes, name: str) -> int:
    """Load a program. Returns its descriptor.

    Args:
        kind: the type, as SK_LOOKUP.
        attach: the expected attach type, as ATTACH_SK_LOOKUP.
        instructions: as `proxyd.host.bpf.assembler` makes them, 8 bytes each.
        name: as `bpftool prog` shows it, 15 characters at most.

    Raises:
        BpfError: the verifier's last word, if it refused the program; EPERM without CAP_BPF; EINVAL if the
            kernel has no such programs.
    """
    log = ctypes.create_string_buffer(_LOG_BYTES)
    with _buffers(instructions, _LICENSE) as (code_at, license_at):
        attributes = [kind, len(instructions) // 8, code_at, license_at]
        tail = struct.pack("=II16sII", 0, 0, name.encode()[:_NAME_BYTES], 0, attach)
        try:
            return _call(
                f"BPF program {name}",
                _PROG_LOAD,
                struct.pack("=IIQQIIQ", *attributes, 1, _LOG_BYTES, ctypes.addressof(log)) + tail,
            )
        except BpfError as error:
            said = _verdict(log.value.decode("utf-8", "replace"))
            raise BpfError(f"BPF program {name}", error.errno or 0, said) from None


def _verdict(log: str) -> str:
    """Why the verifier refused, and at which instruction, in one line; "" where it has said nothing.

    Its log has the instructions it walked through, then the reason, then figures of its own work.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    lines = [
        line for line in lines if not line.startswith(("processed ", "verification time", "stack depth"))
    ]
    if not lines:
        return ""
    at = next((line for line in reversed(lines[:-1]) if line.split(":")[0].isdigit()), "")
    return f"the verifier refused it: {lines[-1]}" + (f" (at instruction {at})" if at else "")


def attach_to_namespace(program: int, attach: int) -> int:
    """Attach a program to this thread's network namespace.

    Returns:
        The link's descriptor. When the last one is closed, the program is detached.

    Raises:
        BpfError: EPERM without CAP_NET_ADMIN; E2BIG where too many are attached.
    """
    with open("/proc/thread-self/ns/net", "rb") as namespace:  # noqa: PTH123 - only its descriptor is of use
        arguments = struct.pack("=IIII", program, namespace.fileno(), attach, 0)
        return _call("BPF link", _LINK_CREATE, arguments)


def replace_program(link: int, program: int) -> None:
    """Put another program in the place of the one that a link attaches. No packet sees neither.

    Raises:
        BpfError: not a link, or a program of another type.
    """
    _call("BPF link", _LINK_UPDATE, struct.pack("=IIII", link, program, 0, 0))


def detach(link: int) -> None:
    """Take a link's program out of its place at once, whoever else has the link.

    Raises:
        BpfError: not a link, or it is detached already.
    """
    _call("BPF link", _LINK_DETACH, struct.pack("=I", link))


def pin(descriptor: int, path: str) -> None:
    """Give a map or link a name in a BPF file system, under which it outlives this process.

    Raises:
        BpfError: EEXIST if the name is taken, EPERM if that is not permitted, ENOENT if there is no folder.
    """
    with _buffers(os.fsencode(path) + b"\0") as (path_at,):
        _call(f"BPF pin {path}", _OBJ_PIN, struct.pack("=QII", path_at, descriptor, 0))


def pinned(path: str) -> int:
    """The descriptor of what is pinned at a path.

    Raises:
        BpfError: ENOENT where there is nothing.
    """
    with _buffers(os.fsencode(path) + b"\0") as (path_at,):
        return _call(f"BPF pin {path}", _OBJ_GET, struct.pack("=QII", path_at, 0, 0))


def kind_of(descriptor: int) -> str:
    """What a descriptor is: "map", "prog" or "link"; "" for anything else."""
    try:
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError:
        return ""
    return name.rpartition("bpf-")[2].rpartition("bpf_")[2] if name.startswith("anon_inode:") else ""


@contextlib.contextmanager
def _buffers(*texts: bytes):  # type: ignore[no-untyped-def]  # noqa: ANN202 - a tuple of addresses
    """Addresses of copies of some bytes, for as long as the block lasts."""
    copies = [ctypes.create_string_buffer(text, len(text)) for text in texts]
    yield tuple(map(ctypes.addressof, copies))
    del copies


def _call(what: str, command: int, attributes: bytes) -> int:
    """Call bpf(2). Descriptors that it returns are close-on-exec."""
    if _NUMBER < 0:
        raise BpfError(what, errno.ENOSYS, f"the number of bpf(2) on {platform.machine()} is not known")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = _libc.syscall(_NUMBER, command, buffer, len(attributes))
    if result < 0:
        raise BpfError(what, ctypes.get_errno())
    return int(result)
