"""First datagrams of flows that met a shortage: they are sent once other flows have made room."""

from __future__ import annotations

from collections.abc import Callable

from proxyd.relay.engine.poller import Poller
from proxyd.relay.udp.mmsg import ClientKey

_MOST = 64


class Postponed:
    """The postponed datagrams of one listener.

    Args:
        poller: closes sockets at the end of a batch.
        send: sends a client's datagram on. One that meets a shortage again is not kept again.
    """

    def __init__(self, poller: Poller, send: Callable[[ClientKey, bytes], None]) -> None:
        self._poller = poller
        self._send = send
        self._kept: list[tuple[ClientKey, bytes]] = []
        self._sending = False

    def keep(self, key: ClientKey, data: memoryview | bytes) -> bool:
        """Keep a datagram for the next turn; False where it was kept before, or too many are."""
        if self._sending or len(self._kept) >= _MOST:
            return False
        if not self._kept:
            self._poller.again(self.send_on)
        self._kept.append((key, bytes(data)))
        return True

    def send_on(self, _events: int) -> None:
        """Send what is kept."""
        kept, self._kept = self._kept, []
        self._sending = True
        try:
            for key, data in kept:
                self._send(key, data)
        finally:
            self._sending = False
