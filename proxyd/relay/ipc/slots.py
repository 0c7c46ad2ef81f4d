"""Round-robin positions and counters in memory that control and its workers share.

One sparse memfd of 64-bit slots; pages that nobody touches cost nothing. Layout:

    MAX_SLOTS round-robin positions     one for each balancer. Every worker writes them without a lock: where
    an
                                        increment is lost, an endpoint is chosen twice, nothing worse.
    for each worker, MAX_SLOTS rows     of FIELDS counters, which that worker alone writes, and control sums.

Each balancer and each endpoint owns one row; control hands the numbers out. Row 0 is for all who come when no
other row is left: its figures are their sum.
"""

from __future__ import annotations

import mmap
import os
import struct
from operator import add

MAX_SLOTS = 1 << 17
MAX_WORKERS = 16

# Counters of a row.
OPENED = 0  # relays begun (balancer: accepted; endpoint: connected)
CLOSED = 1  # relays ended; opened - closed is what is active
FAILED = 2  # balancer: no endpoint could be reached; endpoint: attempts that failed
ATTEMPTS = 3  # connects begun
BYTES_IN = 4  # client to endpoint
BYTES_OUT = 5  # endpoint to client
CONNECT_US = 6  # microseconds from connect to connected, added up
REFUSED = 7  # balancer: clients turned away (source range, no endpoint left)
DATAGRAMS_IN = 8  # UDP datagrams, SCTP messages: client to endpoint
DATAGRAMS_OUT = 9  # UDP datagrams, SCTP messages: endpoint to client
EVICTED = 10  # UDP: flows that were ended to make room for others
DROPPED = 11  # UDP: datagrams for which descriptors, local ports or memory were missing
# UDP datagrams and SCTP messages that were dropped ...
DROPPED_TO_ENDPOINT = (
    12  # as the kernel did not take them for the endpoint: its queue is full, they are too large
)
DROPPED_TO_CLIENT = 13  # as the kernel did not take them for the client
DROPPED_OVERRUN = 14  # UDP: as they came faster than they were read
FIELDS = 16

_ROW = struct.Struct(f"={FIELDS}Q")
_ZEROS = bytes(8 * FIELDS)
SIZE = 8 * MAX_SLOTS * (1 + MAX_WORKERS * FIELDS)


class Slots:
    """The shared slots, as seen by one process. `view[i]` is slot i."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)
        self.view = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls) -> Slots:
        """Make new slots, all zero. Only a child that is given the descriptor inherits it.

        Raises:
            OSError: no memory or descriptors.
        """
        fd = os.memfd_create("proxyd-slots", os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE)
        return cls(fd)

    def row(self, worker: int, slot: int) -> int:
        """Index in `view` of the first counter of a row."""
        return MAX_SLOTS + (worker * MAX_SLOTS + slot) * FIELDS

    def read(self, slot: int, workers: int = MAX_WORKERS) -> list[int]:
        """All counters of a row, each summed over the workers."""
        first = MAX_SLOTS + slot * FIELDS
        step = MAX_SLOTS * FIELDS
        sums: list[int] = []
        for start in range(8 * first, 8 * (first + step * workers), 8 * step):
            row = self._map[start : start + 8 * FIELDS]
            if row != _ZEROS:  # most rows have not counted anything
                counts = _ROW.unpack(row)
                sums = list(map(add, sums, counts)) if sums else list(counts)
        return sums or [0] * FIELDS

    def clear(self, slot: int) -> None:
        """Set a row and its round-robin position to zero, before it is given to another owner."""
        self.view[slot] = 0
        for worker in range(MAX_WORKERS):
            first = self.row(worker, slot)
            for field in range(FIELDS):
                if self.view[first + field]:
                    self.view[first + field] = 0

    def close(self) -> None:
        """Unmap and close."""
        self.view.release()
        self._map.close()
        os.close(self.fd)
