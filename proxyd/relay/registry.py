"""Which class relays a protocol, proxyd's own or another distribution's; and the interface of such a class.

Listener classes are found by protocol name in the entry-point group `proxyd.listeners`. Control looks once,
after it has started the workers, and tells them `module:class` where that is not proxyd's own. So a worker
never looks through the installed distributions, and imports the class of a protocol with its first listener.

A listener class is a `Factory` of a `Listener`, which makes a `Relay` of each client; the other Protocols are
optional.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard, TypeVar, runtime_checkable

if TYPE_CHECKING:  # control looks here too, and is free of the data plane
    from proxyd.relay.engine.balancer import Balancer
    from proxyd.relay.engine.plane import Plane
    from proxyd.relay.ipc.messages import ListenerConfig, LiveConnection

GROUP = "proxyd.listeners"
OWN = {
    "TCP": "proxyd.relay.tcp.listener:TcpListener",
    "UDP": "proxyd.relay.udp.listener:UdpListener",
    "SCTP": "proxyd.relay.sctp.listener:SctpListener",
}
USUAL = ("TCP",)  # what nearly every worker relays
_DISTRIBUTION = "proxyd"

_Part = TypeVar("_Part")


class Listener(Protocol):
    """What relays the clients of one listening socket. `Factory` says how it is made.

    It has `plane.poller` watch the socket. If a method that the poller calls raises, `crash()` of the same
    object is called, where it has that. A listener puts each `Relay` into the plane with
    `plane.opened(relay)` and takes it out with `plane.closed(relay)`. It calls `plane.reporter.drained(id)`
    when it is closed and its last relay has ended: then its address is free.
    """

    id: int
    address: str  # ip:port
    balancer: Balancer  # of new relays

    @property
    def closed(self) -> bool:
        """Whether it accepts no more."""

    @property
    def open_relays(self) -> int:
        """How many relays of it are alive."""

    def close(self) -> None:
        """Stop accepting; relays go on."""


class Relay(Protocol):
    """What joins a client with its endpoint, as the plane's timers see it."""

    def dial_due(self, now: float) -> None:
        """Act on the end of the time that `plane.dial_until` has given; `now`: monotonic seconds."""

    def tick(self, now: float) -> None:
        """Do what is done once a second."""

    def crash(self) -> None:
        """End after an exception of this relay's own code."""


# Optional parts of the interface. A listener or relay that has the members has the part; it need not inherit.


@runtime_checkable
class FollowsEndpoints(Listener, Protocol):
    """A listener that is told when endpoints of its balancer were removed."""

    def endpoints_changed(self) -> None:
        """Let go of endpoints whose `removed` is set: they are not among the balancer's any more."""


@runtime_checkable
class Lingers(Listener, Protocol):
    """A listener that may go on for a moment when the worker ends."""

    def linger(self, seconds: float) -> bool:
        """Take no more clients, and close after `seconds` at most; False: there is nothing to wait for."""


@runtime_checkable
class Drains(Relay, Protocol):
    """A relay that can be ended: when its listener's time to drain is over, or the worker ends."""

    listener: Listener

    def abort(self, reason: str) -> None:
        """End at once."""


@runtime_checkable
class Listed(Protocol):
    """A relay that is shown among the live connections."""

    @property
    def service(self) -> str:
        """Name of its service port, namespace/name:port."""

    def live(self, now: float) -> LiveConnection | None:
        """What it is and does at this moment (`now`: monotonic seconds); None where it has ended."""


def _asking(part: type[_Part]) -> Callable[[object], TypeGuard[_Part]]:
    """Whether an object has a part. That is decided once for each class, as asking a Protocol is slow."""
    known: dict[type, bool] = {}

    def has(thing: object) -> TypeGuard[_Part]:
        kind = type(thing)
        if kind not in known:
            known[kind] = isinstance(thing, part)
        return known[kind]

    return has


# mypy takes a Protocol that is passed for a class that will be instantiated.
follows_endpoints = _asking(FollowsEndpoints)  # type: ignore[type-abstract]
lingers = _asking(Lingers)  # type: ignore[type-abstract]
drains = _asking(Drains)  # type: ignore[type-abstract]
is_listed = _asking(Listed)  # type: ignore[type-abstract]


class Factory(Protocol):
    """A listener class."""

    def __call__(self, config: ListenerConfig, fd: int, balancer: Balancer, plane: Plane, /) -> Listener:
        """Make a listener.

        Args:
            config: what control said.
            fd: the socket, bound and (but for UDP) listening; owned by the listener from now on.
            balancer: chooses the endpoint of each new relay.
            plane: of the worker.

        Raises:
            OSError: the socket can't be watched.
        """


class Found(NamedTuple):
    """What other distributions bring: `module:class` by protocol, and notes for the operator."""

    classes: dict[str, str]
    notes: tuple[str, ...]


@cache
def load(protocol: str, implementation: str = "") -> Factory:
    """The listener class of a protocol.

    Args:
        protocol: its name.
        implementation: `module:class`; "" for proxyd's own.

    Raises:
        LookupError: there is none.
        ImportError: it can't be imported, whatever the module has raised.
    """
    path = implementation or OWN.get(protocol, "")
    if not path:
        raise LookupError(f"{protocol} is not relayed here")
    module, _, name = path.partition(":")
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ImportError(f"{path}: {type(error).__name__}: {error}") from error
    return found  # type: ignore[no-any-return]  # what an entry point names is what it is


@cache
def find() -> Found:
    """Listener classes of other distributions. If two bring one for a protocol, the first by name counts."""
    if not _anybody_else(sys.path):
        return Found({}, ())
    # Imported late: it takes 50 ms, while looking at the files takes one where no other distribution has any.
    from importlib.metadata import distributions  # noqa: PLC0415

    offers = sorted(
        {
            (point.name, distribution.metadata["Name"] or "", distribution.version, point.value)
            for distribution in distributions()
            for point in distribution.entry_points
            if point.group == GROUP and distribution.metadata["Name"] != _DISTRIBUTION
        }
    )
    classes: dict[str, str] = {}
    notes = []
    for protocol, name, version, value in offers:
        offer = f"{value} of {name} {version}"
        if protocol in classes:
            notes.append(f"{protocol} listeners: {offer} is left out: another distribution brings them too")
            continue
        classes[protocol] = value
        notes.append(f"{protocol} listeners are {offer}")
    return Found(classes, tuple(notes))


def _anybody_else(path: Sequence[str]) -> bool:
    """Whether a distribution other than proxyd may have listeners; cheap."""
    needle = GROUP.encode()
    for file in _entry_points(path):
        if not file:
            return True
        try:
            with open(file, "rb") as opened:  # noqa: PTH123 - hundreds of small files, at the start
                if needle in opened.read():
                    return True
        except OSError:
            continue  # most have none
    return False


def _entry_points(path: Sequence[str]) -> Iterator[str]:
    """Files that may name entry points; "" for a place that has to be asked otherwise, such as an archive."""
    for folder in path:
        try:
            with os.scandir(folder or ".") as entries:
                names = [entry.name for entry in entries if entry.name.endswith((".dist-info", ".egg-info"))]
        except NotADirectoryError:
            yield ""
            continue
        except OSError:
            continue
        for name in names:
            if name.partition("-")[0] != _DISTRIBUTION:
                yield os.path.join(folder, name, "entry_points.txt")  # noqa: PTH118 - as above
