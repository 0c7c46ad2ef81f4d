"""Which class relays a protocol: proxyd's own, or the one that another distribution brings.

Listeners are found by protocol name in the entry-point group `proxyd.listeners`. Control looks once, after it
has started the workers, and tells the workers `module:class` only where that is not proxyd's own; so a worker never looks
through installed distributions, and imports the class of a protocol with its first listener.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # control looks here too, and is free of the data plane
    from proxyd.relay.engine.balancer import Balancer
    from proxyd.relay.engine.plane import Plane
    from proxyd.relay.ipc.messages import ListenerConfig

GROUP = "proxyd.listeners"
OWN = {
    "TCP": "proxyd.relay.tcp.listener:TcpListener",
    "UDP": "proxyd.relay.udp.listener:UdpListener",
    "SCTP": "proxyd.relay.sctp.listener:SctpListener",
}
_DISTRIBUTION = "proxyd"


class Listener(Protocol):
    """What relays the clients of one listening socket.

    It is made with `(config: ListenerConfig, fd: int, balancer: Balancer, plane: Plane)`, owns the descriptor from then
    on, and raises OSError where it can't be watched. It registers with `plane.poller`; whatever it relays it puts into
    `plane.relays` with `plane.opened(relay)` and takes out with `plane.closed(relay)`. A relay has `dial_due(now)`,
    `tick(now)` and `crash()`; one with `abort(reason)` and `listener` is ended when its time to drain is over, one with
    `service` and `live(now)` is listed.

    A listener may also have `endpoints_changed()`, called after endpoints of its balancer were removed, and
    `linger(seconds)`, called instead of `close` when the worker ends: whether there is something to wait for.
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
        """Stop accepting; relays go on. `plane.reporter.drained(id)` is called when none is left."""


class Factory(Protocol):
    """A listener class."""

    def __call__(self, config: ListenerConfig, fd: int, balancer: Balancer, plane: Plane, /) -> Listener:
        """Make one."""


class Found(NamedTuple):
    """What other distributions bring: `module:class` by protocol, and what an operator should read about it."""

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
        ImportError: it can't be imported; whatever else the module raises is turned into this.
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
    """Listeners of other distributions. Of two for one protocol that of the first distribution by name counts."""
    if not _anybody_else(sys.path):
        return Found({}, ())
    # Imported late: it takes 50 ms, and where nobody else is, a look at the files takes one.
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
    """Whether a distribution other than proxyd may have listeners, seen at a glance."""
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
    """Files that may name entry points; "" where that takes more than a look, as of an archive."""
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
