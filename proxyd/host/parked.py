"""Parked listeners of VIPs: bound to a port that nobody wants, and found by the kernel for the real one.

VIP:80 itself is never bound. So a daemon of this node may listen on 0.0.0.0:80, before or after proxyd
starts, and both work. The socket listens at VIP:4, say, and a map tells the program of
`proxyd.host.bpf.vip_lookup` that it is for VIP:80. Accepted sockets have the address VIP:80, which the client
used. The same program refuses the other ports of a VIP, before its route is there and after it is gone.

UDP replies leave from the parking port: `proxyd.host.udp_source` puts the right one in its place.

Link and maps go with their last descriptor. Pins in a BPF file system keep them beyond this process, or else
the service manager's descriptor store: after a kill the VIPs stay guarded until the next start.

Needs CAP_BPF, CAP_NET_ADMIN, CAP_NET_BIND_SERVICE and Linux 5.9.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import socket
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from proxyd.api.service import Protocol
from proxyd.host.bpf import syscall as bpf
from proxyd.host.bpf import vip_lookup
from proxyd.host.sockets import BACKLOG, BindFailed, open_listener
from proxyd.state.spec import ListenerKey, ListenerSpec

# The descriptors by name, as they are pinned and stored.
VIPS, PORTS, LINK = NAMES = ("proxyd-vips", "proxyd-ports", "proxyd-link")
# Entries of each map. Kernels since 5.11 charge the cgroup, 2 MB for each map; earlier ones RLIMIT_MEMLOCK.
MAX_ENTRIES = 131_072
BPF_FS = "/sys/fs/bpf"

# Privileged ports that no service has (IANA): no daemon wants them, and nobody unprivileged can take them.
_RANGES = ((4, 4), (6, 6), (8, 8), (10, 10), (12, 12), (14, 14), (16, 16), (225, 241), (288, 307), (325, 332))
PARKING_PORTS = (
    *(port for first, last in _RANGES for port in range(first, last + 1)),
    *(port for port in range(1023, 332, -1)),  # of a VIP with more than that
)


class ParkedListeners:
    """The maps and the link of this network namespace.

    Args:
        descriptors: by name, of what an earlier process made; it is used rather than made anew.

    Raises:
        BpfError: it can't be had here.
    """

    def __init__(self, descriptors: Mapping[str, int] | None = None) -> None:
        self._vips = self._ports = self._link = -1
        self._guarded: set[str] = set()
        if not any(self._adopt(found) for found in (dict(descriptors or {}), _pinned())):
            self._make()
        self._parked: dict[ListenerKey, int] = {}  # the ports that sockets are bound to
        self._passed: set[ListenerKey] = set()

    @property
    def descriptors(self) -> dict[str, int]:
        """Of maps and link, by name."""
        return {VIPS: self._vips, PORTS: self._ports, LINK: self._link}

    @property
    def ports(self) -> Mapping[ListenerKey, int]:
        """The port that each listener's socket is bound to."""
        return self._parked

    @property
    def udp_ports(self) -> dict[ListenerKey, int]:
        """The ports that UDP sockets are parked at, which replies leave from."""
        return {key: port for key, port in self._parked.items() if key.protocol is Protocol.UDP}

    def parks(self, spec: ListenerSpec) -> bool:
        """Whether a listener is to be parked: TCP or UDP at an address that is guarded here."""
        return spec.key.ip in self._guarded and spec.key.protocol in vip_lookup.PROTOCOLS

    def guard(self, vips: Iterable[str]) -> None:
        """Refuse all ports of these addresses but those that are listened on, and of no others.

        Raises:
            BpfError: the map is full.
        """
        wanted = set(vips)
        for ip in wanted - self._guarded:
            bpf.update(self._vips, vip_lookup.key(ip), vip_lookup.REFUSE)
            self._guarded.add(ip)
        for ip in self._guarded - wanted:
            bpf.delete(self._vips, vip_lookup.key(ip))
            self._guarded.discard(ip)

    def open(self, spec: ListenerSpec, backlog: int = BACKLOG) -> socket.socket:
        """Open a listener's socket at a port that is free. Clients reach it after `admit`.

        Raises:
            BindFailed: with what to do.
        """
        ip, protocol = spec.key.ip, spec.key.protocol
        first = sum(key.ip == ip and key.protocol is protocol for key in self._parked) if self._parked else 0
        for port in (*PARKING_PORTS[first:], *PARKING_PORTS[:first]):
            try:
                sock = open_listener(spec, backlog, parked_at=port)
            except BindFailed as error:
                if not error.taken:
                    raise
                continue
            self._parked[spec.key] = port
            return sock
        raise BindFailed(f"no port of {ip} is free to park a listener at")

    def adopt(self, spec: ListenerSpec, sock: socket.socket) -> int:
        """Take a socket that an earlier program opened. Returns the port that it is bound to."""
        port = self._parked[spec.key] = sock.getsockname()[1]
        return int(port)

    def admit(self, key: ListenerKey, sock: socket.socket) -> None:
        """Have clients find a socket from now on. None is refused while it takes the place of another.

        Raises:
            BindFailed: the map is full, or the socket listens no more.
        """
        try:
            self._take_back(key)
            bpf.update(self._ports, _key(key), struct.pack("=Q", sock.fileno()))
        except OSError as error:
            raise BindFailed(f"cannot have {key} looked up: {error.strerror or error}") from error

    def refuse(self, key: ListenerKey) -> None:
        """Have the clients of a port refused, at once; its socket may be open."""
        if key.protocol not in vip_lookup.PROTOCOLS:
            return  # the program sees nothing else
        self._parked.pop(key, None)
        with contextlib.suppress(OSError):
            bpf.delete(self._ports, _key(key))
        self._take_back(key)

    def leave_to_others(self, key: ListenerKey) -> None:
        """Let clients of a port find who is bound to it.

        Raises:
            BpfError: the map is full.
        """
        self._passed.add(key)
        bpf.update(self._vips, _key(key), vip_lookup.PASS_PORT)

    def _take_back(self, key: ListenerKey) -> None:
        if key in self._passed:
            self._passed.discard(key)
            bpf.delete(self._vips, _key(key))

    def pin(self) -> str:
        """Keep link and maps beyond this process in the BPF file system. Returns "", or why it can't."""
        folder = _folder()
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            for name, descriptor in self.descriptors.items():
                path = folder / name
                with contextlib.suppress(FileExistsError):
                    bpf.pin(descriptor, str(path))
        except OSError as error:
            unpin()
            return error.strerror or str(error)
        return ""

    def remove(self) -> None:
        """Take everything back, also from who else has the link."""
        if self._link >= 0:
            with contextlib.suppress(OSError):
                bpf.detach(self._link)
        unpin()
        self.close()

    def close(self) -> None:
        """Close the descriptors. What is neither pinned nor stored is gone."""
        for descriptor in (self._link, self._ports, self._vips):
            if descriptor >= 0:
                os.close(descriptor)
        self._link = self._ports = self._vips = -1

    def _adopt(self, found: dict[str, int]) -> bool:
        """Go on with maps and link of an earlier process. If that is not possible they are closed."""
        if found.keys() != set(NAMES):
            for descriptor in found.values():
                os.close(descriptor)
            return False
        self._vips, self._ports, self._link = (found[name] for name in NAMES)
        try:
            with _closing(_program(self._vips, self._ports)) as program:
                bpf.replace_program(self._link, program)
            keys = bpf.keys(self._vips, vip_lookup.KEY_BYTES)
        except OSError:  # it was detached, or is of another program
            self.close()
            return False
        self._guarded = {ip for key in keys if (ip := _address(key))}
        for key in keys:
            if not _address(key):  # a port that was left to somebody else
                bpf.delete(self._vips, key)
        return True

    def _make(self) -> None:
        _raise_memlock()
        try:
            self._vips = bpf.create_map(
                bpf.HASH, vip_lookup.KEY_BYTES, 1, MAX_ENTRIES, name="proxyd_vips", flags=bpf.NO_PREALLOC
            )
            self._ports = bpf.create_map(
                bpf.SOCKHASH, vip_lookup.KEY_BYTES, 8, MAX_ENTRIES, name="proxyd_ports"
            )
            with _closing(_program(self._vips, self._ports)) as program:
                self._link = bpf.attach_to_namespace(program, bpf.ATTACH_SK_LOOKUP)
        except BaseException:
            self.close()
            raise


def kernel_may_park() -> bool:
    """Whether this kernel is recent enough, by its version. It needs no privilege, so it is not certain."""
    version = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return version is not None and (int(version[1]), int(version[2])) >= (5, 9)


def discard(descriptors: Mapping[str, int]) -> None:
    """Take back what an earlier process left: these descriptors by name, and what is pinned."""
    for found in (descriptors, _pinned()):
        for name, descriptor in found.items():
            if name == LINK:
                with contextlib.suppress(OSError):
                    bpf.detach(descriptor)
            os.close(descriptor)
    unpin()


def is_pinned() -> bool:
    """Whether an earlier process left a link that is pinned for this network namespace."""
    return (_folder() / LINK).exists()


def unpin() -> None:
    """Remove what is pinned for this network namespace. A link that no process has is gone."""
    folder = _folder()
    for name in (LINK, PORTS, VIPS):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _folder() -> Path:
    """Of this network namespace, in the BPF file system."""
    return Path(BPF_FS, f"proxyd-{os.stat('/proc/thread-self/ns/net').st_ino}")  # noqa: PTH116 - a name only


def _pinned() -> dict[str, int]:
    """What is pinned, by name; {} unless that is all."""
    found: dict[str, int] = {}
    try:
        for name in NAMES:
            found[name] = bpf.pinned(str(_folder() / name))
    except OSError:
        for descriptor in found.values():
            os.close(descriptor)
        return {}
    return found


def _program(vips: int, ports: int) -> int:
    """Load the program. Returns its descriptor.

    Raises:
        BpfError: the kernel refuses it.
    """
    try:
        code = vip_lookup.program(vips, ports)
        return bpf.load_program(bpf.SK_LOOKUP, bpf.ATTACH_SK_LOOKUP, code, "proxyd_vips")
    except bpf.BpfError as error:
        if error.errno == errno.EPERM:
            raise
        code = vip_lookup.program(vips, ports, interface=False)  # a kernel before 5.17
        return bpf.load_program(bpf.SK_LOOKUP, bpf.ATTACH_SK_LOOKUP, code, "proxyd_vips")


@contextlib.contextmanager
def _closing(descriptor: int):  # type: ignore[no-untyped-def]  # noqa: ANN202 - it yields the descriptor
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _raise_memlock() -> None:
    """Before Linux 5.11 maps count against it; best effort."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def why_not(error: OSError) -> str:
    """Why listeners can't be parked here, in one line, of what `ParkedListeners` raises."""
    if error.errno in (errno.EPERM, errno.EACCES):
        if os.geteuid() == 0:
            return "bpf(2) is not permitted: a security policy, a container or kernel lockdown forbids it"
        return "bpf(2) needs CAP_BPF and CAP_NET_ADMIN"
    if error.errno == errno.ENOSYS:
        return "bpf(2) is not available: a seccomp filter or this kernel lacks it"
    if error.errno == errno.EINVAL:
        return "the kernel has no programs that look up sockets (Linux 5.9)"
    return error.strerror or str(error)


def _key(key: ListenerKey) -> bytes:
    return vip_lookup.key(key.ip, key.port, key.protocol)


def _address(key: bytes) -> str:
    """The address of a key of the map of addresses; "" for that of a port."""
    (word,) = struct.unpack_from("=I", key, 16)
    if word & 0xFFFFFF:
        return ""
    family = word >> 24
    return socket.inet_ntop(family, key[:4] if family == socket.AF_INET else key[:16])
