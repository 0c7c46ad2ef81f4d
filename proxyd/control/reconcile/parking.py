"""Parks listeners of VIPs: a program of the kernel finds them for clients, and they take nobody's port."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet

from proxyd.api.service import Protocol
from proxyd.control.runtime.logs import get_logger
from proxyd.control.workers.inherited_sockets import InheritedSockets
from proxyd.host.holders import bound_exactly
from proxyd.host.links import devices_make_checksums
from proxyd.host.parked import ParkedListeners
from proxyd.host.sockets import BindFailed, open_listener
from proxyd.host.udp_source import UdpSourcePorts
from proxyd.state.spec import ListenerKey, ListenerSpec

log = get_logger("reconciler")

Opened = dict[ListenerKey, socket.socket | BindFailed]


class Parking:
    """The parked listeners of this node.

    Args:
        parked: the program's maps.
        udp: puts the ports of UDP replies right; None if that is not possible: UDP is then not parked.
        kept: whether VIPs stay guarded when this process is killed.
        forget: has the service manager close what it keeps by a name.

    Attributes:
        gso: whether UDP replies may be sent as a buffer of segments, although nftables change their port.
    """

    def __init__(
        self,
        parked: ParkedListeners,
        udp: UdpSourcePorts | None,
        *,
        kept: bool,
        forget: Callable[[str], None],
    ) -> None:
        self.kept = kept
        self._forget_stored = forget
        self._parked = parked
        self._udp = udp
        self._error = ""
        self.gso = devices_make_checksums()
        self._bound: set[ListenerKey] = set()
        # UDP sockets of closed listeners whose flows may still have replies to send.
        self._replying: dict[ListenerKey, int] = {}

    def look_at_devices(self) -> dict[ListenerKey, int]:
        """Look again whether `gso` holds. Returns the UDP listeners for which that has changed."""
        before, self.gso = self.gso, devices_make_checksums()
        return self._parked.udp_ports if self.gso != before else {}

    @property
    def descriptors(self) -> dict[str, int]:
        """Of maps and link, by name, for the next program."""
        return self._parked.descriptors

    def begin(self, vips: AbstractSet[str], inherited: InheritedSockets) -> None:
        """Guard the VIPs that there are. Clients still find the sockets that the program before left.

        Args:
            vips: those that are local by a route.
            inherited: sockets that no listener has taken yet.
        """
        for key, sock in inherited.at(vips):
            try:
                self._parked.admit(key, sock)
            except BindFailed as error:
                self._say(str(error))
        if vips:
            self.guard(vips)

    def guard(self, vips: AbstractSet[str]) -> None:
        """Refuse the ports of VIPs that nobody listens on. To be called while a VIP has no route.

        An address that is the node's own is guarded too: as a VIP it is one that somebody has put there, such
        as kube-proxy's IPVS mode.
        """
        try:
            self._parked.guard(ip for ip in vips if not ip.startswith("127.") and ip != "::1")
        except OSError as error:
            self._say(f"VIPs are not guarded: {error.strerror or error}")

    def parks(self, spec: ListenerSpec) -> bool:
        """Whether a listener is to be opened by `open`."""
        return self._parked.parks(spec)

    def open(self, specs: Sequence[ListenerSpec], inherited: InheritedSockets, backlog: int) -> Opened:
        """Open listeners, each parked or with the socket that the program before an upgrade left.

        UDP ones are bound where replies can't be given their port; clients find them by the program as well.

        Returns:
            The sockets, which clients find from now on, and what failed.
        """
        others = _binders(spec.key for spec in specs)
        found: Opened = {}
        for spec in specs:
            left = inherited.take(spec, parked=True)
            if left is not None:
                if self._parked.adopt(spec, left) == spec.key.port:
                    self._bound.add(spec.key)
                found[spec.key] = left
                continue
            try:
                who = others.get(spec.key)
                found[spec.key] = self._open(spec, backlog) if who is None else self.leave_to(spec.key, who)
            except BindFailed as error:
                found[spec.key] = error
        self._send_from(found)
        for key, sock in found.items():
            if isinstance(sock, socket.socket):
                try:
                    self._parked.admit(key, sock)
                except BindFailed as error:
                    sock.close()
                    found[key] = error
        return found

    def _open(self, spec: ListenerSpec, backlog: int) -> socket.socket:
        if spec.key.protocol is not Protocol.UDP or self._udp is not None:
            return self._parked.open(spec, backlog)
        sock = open_listener(spec, backlog)
        self._parked.adopt(spec, sock)
        return sock

    def take_bound(self) -> set[ListenerKey]:
        """The listeners whose inherited socket is bound to their own port, each once."""
        bound, self._bound = self._bound, set()
        return bound

    def close(self, key: ListenerKey) -> None:
        """Refuse clients of a listener that is about to be closed."""
        if (port := self._parked.udp_ports.get(key)) is not None:
            self._replying[key] = port
        self._parked.refuse(key)

    def settle(self, held: AbstractSet[ListenerKey]) -> None:
        """Forget closed UDP listeners without flows; `held` are the keys of those that have some."""
        if gone := [key for key in self._replying if key not in held]:
            for key in gone:
                del self._replying[key]
            self._send_from({})

    def taken_by_others(self) -> dict[ListenerKey, str]:
        """The parked listeners that somebody else is bound to by now, with who that is ("" if unknown)."""
        ports = self._parked.ports
        return _binders(key for key, port in ports.items() if port != key.port)

    @property
    def has_table(self) -> bool:
        """Whether the nft table of UDP replies is there, as far as is known."""
        return self._udp is not None and self._udp.made

    def forget(self) -> None:
        """Make the nft table of UDP replies anew: somebody else has changed it."""
        if self._udp is not None:
            self._udp.forget()
            self._send_from({})

    def close_descriptors(self) -> None:
        """Close link and maps, as at the end."""
        self._parked.close()

    def remove(self) -> None:
        """Take everything back."""
        if self._udp is not None:
            self._udp.remove()
        for name in self._parked.descriptors:
            self._forget_stored(name)
        self._parked.remove()

    def leave_to(self, key: ListenerKey, who: str) -> BindFailed:
        """Leave a port to who is bound to it. Returns what is told of it."""
        try:
            self._parked.leave_to_others(key)
        except OSError as error:
            self._say(f"{key} is refused, though another process is bound to it: {error.strerror or error}")
        text = f"in use by {who or 'another process'}, which is bound to {key.ip} itself and keeps it"
        return BindFailed(text, taken=True)

    def _send_from(self, found: Opened) -> None:
        """Have UDP replies leave from the right ports. If that fails, the listeners just opened fail too."""
        if self._udp is None:
            return
        error = self._udp.sync({**self._replying, **self._parked.udp_ports})
        if not error:
            return
        for key, sock in found.items():
            if key.protocol is Protocol.UDP and isinstance(sock, socket.socket):
                sock.close()
                self._parked.refuse(key)
                found[key] = BindFailed(f"nft can't give its replies their port: {error}")
        self._say(f"replies of UDP Services leave from wrong ports: {error}")

    def _say(self, text: str) -> None:
        if text != self._error:
            log.warning(text)
        self._error = text


def _binders(keys: Iterable[ListenerKey]) -> dict[ListenerKey, str]:
    try:
        return bound_exactly(keys)
    except OSError:  # a sandbox: nothing is known of others
        return {}
