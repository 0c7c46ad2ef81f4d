"""The program that looks up sockets of VIPs: it finds the parked listener of a port, and refuses other ports.

The kernel runs it (type SK_LOOKUP) for each TCP SYN, and for each UDP datagram that no connected socket
takes, before it looks for a listening socket. So it finds a socket for VIP:80 though none is bound there, and
a daemon at 0.0.0.0:80 gets nothing of a VIP.

Two maps have keys of address, port, protocol and family. `vips` has an entry with port and protocol 0 for
each VIP: REFUSE. It also has one for each port that somebody else is bound to: PASS_PORT. `listeners` has
sockets.
"""

from __future__ import annotations

import socket
import struct

from proxyd.api.service import Protocol
from proxyd.host.bpf.assembler import Assembler, R

KEY_BYTES = 20
REFUSE, PASS_PORT = b"\1", b"\2"

PROTOCOLS = {Protocol.TCP: socket.IPPROTO_TCP, Protocol.UDP: socket.IPPROTO_UDP}

# struct bpf_sk_lookup of linux/bpf.h: offsets in bytes.
_FAMILY, _PROTOCOL = 8, 12
_REMOTE_IP4, _REMOTE_IP6, _REMOTE_PORT = 16, 20, 36  # the port in network order
_LOCAL_IP4, _LOCAL_IP6, _LOCAL_PORT = 40, 44, 60  # the port in host order
_INTERFACE = 64  # since Linux 5.17

# Where the key is on the stack: four words of address, then port, protocol and family in one word.
_KEY = -24
_WORD = _KEY + 16

# Helpers of linux/bpf.h.
_MAP_LOOKUP_ELEM, _SK_RELEASE, _SK_ASSIGN = 1, 86, 124
_DROP, _PASS = 0, 1
_LOOPBACK = 1  # the index of `lo` in every network namespace


def key(ip: str, port: int = 0, protocol: Protocol | None = None) -> bytes:
    """A key of both maps; port 0 for an entry of an address.

    Raises:
        ValueError: not an IP address.
    """
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        address = socket.inet_pton(family, ip)
    except OSError:
        raise ValueError(f"{ip} is not an IP address") from None
    number = PROTOCOLS[protocol] if protocol is not None else 0
    return address.ljust(16, b"\0") + struct.pack("=I", port | number << 16 | family << 24)


def program(vips: int, listeners: int, *, interface: bool = True) -> bytes:
    """The instructions.

    Args:
        vips: descriptor of the map of addresses.
        listeners: descriptor of the map of sockets.
        interface: whether the kernel tells the interface, as since 5.17. Without it a datagram from a port
            of a VIP that is listened on passes from everywhere, not over `lo` alone.
    """
    a = Assembler()
    a.move(R.R6, R.R1)  # r6: what is looked for
    a.load(4, R.R7, R.R6, _FAMILY)
    for offset in range(0, 16, 4):
        a.store_value(4, R.FRAME, _KEY + offset, 0)  # of IPv4 three words of the address stay 0
    a.jump_if_equal(R.R7, socket.AF_INET, "local 4")
    a.jump_if_not(R.R7, socket.AF_INET6, "pass")
    for offset in range(0, 16, 4):
        a.load(4, R.R1, R.R6, _LOCAL_IP6 + offset)
        a.store(4, R.FRAME, _KEY + offset, R.R1)
    a.jump("address")
    a.label("local 4")
    a.load(4, R.R1, R.R6, _LOCAL_IP4)
    a.store(4, R.FRAME, _KEY, R.R1)

    a.label("address")
    a.shift_left(R.R7, 24)  # r7: the family's part of the word
    a.store(4, R.FRAME, _WORD, R.R7)
    _look_up(a, vips)
    a.jump_if_equal(R.R0, 0, "pass")  # not a VIP: all that other traffic pays for
    a.load(1, R.R8, R.R0, 0)  # r8: whether other ports are refused

    a.load(4, R.R9, R.R6, _PROTOCOL)
    a.shift_left(R.R9, 16)
    a.bit_or(R.R9, R.R7)  # r9: the word without the port
    a.load(4, R.R1, R.R6, _LOCAL_PORT)
    a.bit_or(R.R1, R.R9)
    a.store(4, R.FRAME, _WORD, R.R1)
    _look_up(a, listeners)
    a.jump_if_not(R.R0, 0, "found")
    a.jump_if_equal(R.R8, 0, "pass")
    _look_up(a, vips)
    a.jump_if_not(R.R0, 0, "pass")  # somebody else is bound to this port of the VIP

    # A UDP client of this node that is not connected has the VIP as its own address, so the Service's answer
    # goes from VIP:PORT to the VIP. It passes if it comes over `lo`, from a port with a listener.
    a.load(4, R.R1, R.R6, _PROTOCOL)
    a.jump_if_not(R.R1, socket.IPPROTO_UDP, "drop")
    if interface:
        a.load(4, R.R1, R.R6, _INTERFACE)
        a.jump_if_not(R.R1, _LOOPBACK, "drop")
    a.load(4, R.R1, R.R6, _FAMILY)
    a.jump_if_equal(R.R1, socket.AF_INET, "remote 4")
    for offset in range(0, 16, 4):
        a.load(4, R.R1, R.R6, _REMOTE_IP6 + offset)
        a.store(4, R.FRAME, _KEY + offset, R.R1)
    a.jump("remote port")
    a.label("remote 4")
    a.load(4, R.R1, R.R6, _REMOTE_IP4)
    a.store(4, R.FRAME, _KEY, R.R1)
    a.label("remote port")
    a.load(2, R.R1, R.R6, _REMOTE_PORT)
    a.from_network(16, R.R1)
    a.bit_or(R.R1, R.R9)
    a.store(4, R.FRAME, _WORD, R.R1)
    _look_up(a, listeners)
    a.jump_if_equal(R.R0, 0, "drop")
    a.move(R.R1, R.R0)
    a.call(_SK_RELEASE)  # the verifier demands that a socket that was found is given back
    a.jump("pass")

    a.label("found")
    a.move(R.R9, R.R0)
    a.move(R.R1, R.R6)
    a.move(R.R2, R.R0)
    a.move(R.R3, 0)
    a.call(_SK_ASSIGN)
    a.move(R.R8, R.R0)
    a.move(R.R1, R.R9)
    a.call(_SK_RELEASE)
    a.jump_if_not(R.R8, 0, "drop")  # it listens no more: nobody else gets its clients

    a.label("pass")
    a.move(R.R0, _PASS)
    a.exit()
    a.label("drop")  # as a closed port: TCP is answered with RST, UDP with ICMP port unreachable
    a.move(R.R0, _DROP)
    a.exit()
    return bytes(a)


def _look_up(a: Assembler, map_: int) -> None:
    """r0 = the entry of a map for the key on the stack; 0 where there is none."""
    a.load_map(R.R1, map_)
    a.move(R.R2, R.FRAME)
    a.add(R.R2, _KEY)
    a.call(_MAP_LOOKUP_ELEM)
