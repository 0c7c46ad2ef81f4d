"""Opens SCTP endpoints: all listeners of a home have one socket, and come and go one by one.

It is imported with the first SCTP listener.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence

from proxyd.control.workers.inherited_sockets import InheritedSockets
from proxyd.control.workers.publication import Held, Publication
from proxyd.host import sctp
from proxyd.host.sockets import BindFailed
from proxyd.state.spec import Home, ListenerKey, ListenerSpec, SctpOptions

_Failed = dict[ListenerKey, BindFailed]


class SctpEndpoints:
    """Opens listeners of SCTP endpoints.

    Args:
        publication: owns the sockets.
        inherited: sockets of the program before an upgrade.
        options: of all SCTP sockets.
    """

    def __init__(self, publication: Publication, inherited: InheritedSockets, options: SctpOptions) -> None:
        self._publication = publication
        self._inherited = inherited
        self._options = options

    def open(self, specs: Iterable[ListenerSpec], backlog: int) -> _Failed:
        """Open listeners and publish them. Each joins the socket of its home, or they get a new one together.

        Returns:
            The listeners that failed; all others are open.
        """
        groups: dict[Home | ListenerKey, list[ListenerSpec]] = {}
        for spec in specs:
            groups.setdefault(spec.home or spec.key, []).append(spec)
        failed: _Failed = {}
        for members in groups.values():
            home = members[0].home
            held = self._publication.home(home) if home else None
            failed |= self._join(held, members) if held else self._found(members, backlog)
        return failed

    def _join(self, held: Held, members: Iterable[ListenerSpec]) -> _Failed:
        failed: _Failed = {}
        for spec in members:
            try:
                sctp.add_address(held.socket, spec)
            except BindFailed as error:
                failed[spec.key] = error
            else:
                self._publication.join(spec, held)
        return failed

    def _found(self, members: Sequence[ListenerSpec], backlog: int) -> _Failed:
        inherited = self._inherited.take_endpoint(members)
        if inherited is not None:
            return self._adopt(*inherited, members)
        sock, failed = sctp.open_endpoint(members, self._options, backlog)
        if sock is not None:
            self._publish(sock, [spec for spec in members if spec.key not in failed])
        return failed

    def _adopt(
        self, sock: socket.socket, bound: Sequence[ListenerKey], members: Sequence[ListenerSpec]
    ) -> _Failed:
        """Serve with an inherited socket that is bound to at least one member."""
        if known := sctp.bound_to(sock):
            bound = [key for key in bound if key.ip in known] or bound
        held = self._publish(sock, [spec for spec in members if spec.key in bound])
        failed = self._join(held, [spec for spec in members if spec.key not in bound])
        for key in set(bound).difference(spec.key for spec in members):
            leave(held, key)
        return failed

    def _publish(self, sock: socket.socket, specs: Sequence[ListenerSpec]) -> Held:
        self._publication.open(specs[0], sock)
        held = self._publication.held[specs[0].key]
        for spec in specs[1:]:
            self._publication.join(spec, held)
        return held


def leave(held: Held, key: ListenerKey) -> str:
    """Unbind one address of a socket that keeps others.

    Returns:
        "", or one line that says why the address stays bound until the socket is closed.
    """
    try:
        sctp.remove_address(held.socket, key)
    except OSError as error:
        return error.strerror or str(error)
    return ""
