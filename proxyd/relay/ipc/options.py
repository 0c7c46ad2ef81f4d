"""What a worker is started with."""

from __future__ import annotations

from typing import Any

import msgspec


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a worker, the same for its whole life.

    Control makes them once from its own settings, by name, and gives them to every worker as one argument.
    """

    tcp_idle_timeout: float = 0.0  # seconds without a byte after which a TCP relay is ended; 0: never
    tcp_splice: bool = True  # bulk goes by splice(2), which copies nothing
    udp_timeout: float | None = (
        None  # seconds after which an idle UDP flow is ended; None: as the table has it
    )
    sctp_max_message: int = 256 * 1024  # bytes; a larger one ends its association
    workers: int = 1  # that share the node's local ports, and the user's pipes; 0: one, within control
    records: bool = False  # send a Connection for every relay that ended
    max_relays: int = 0  # at once; 0: as many as descriptors allow

    @classmethod
    def of(cls, settings: object, **others: Any) -> Options:
        """Those of a daemon: each has the value of the setting of its name; `others` are no settings."""
        return msgspec.structs.replace(msgspec.convert(settings, cls, from_attributes=True), **others)

    @classmethod
    def decode(cls, text: str) -> Options:
        """From an argument.

        Raises:
            ValueError: it is none.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(str(error)) from None

    def encode(self) -> str:
        """As an argument."""
        return msgspec.json.encode(self).decode()
