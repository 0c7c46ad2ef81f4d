"""Layouts of SCTP socket options: what is packed can be read, whatever the values."""

from __future__ import annotations

import struct
from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from proxyd.state import sctpsocket as s

u16 = st.integers(0, 0xFFFF)
ips = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)


@given(u16, u16, u16, st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))
def test_a_message_is_sent_as_it_came(stream: int, ssn: int, flags: int, ppid: bytes, rest: bytes) -> None:
    # struct sctp_rcvinfo of RFC 6458, 5.3.5.
    received = struct.pack("=HHHH", stream, ssn, flags, 0) + ppid + rest
    control = s.send_control(s.message_key(received))
    ((level, kind, data),) = control
    assert (level, kind, len(data)) == (132, s.SNDINFO, 16)
    # struct sctp_sndinfo of RFC 6458, 5.3.4: the identifier's bytes are those that came; only "unordered" is passed on.
    assert data == struct.pack("=HH", stream, flags & 1) + ppid + bytes(8)
    assert s.sent_on(control) == stream


@given(st.lists(ips, min_size=1, max_size=16), st.integers(1, 65535))
def test_addresses_lie_behind_each_other(given_ips: list[str], port: int) -> None:
    packed = s.addresses(given_ips, port)
    for ip in given_ips:
        size = 28 if ":" in ip else 16
        one, packed = packed[:size], packed[size:]
        meant = ip_address(ip)
        assert s.read_address(one) == str(getattr(meant, "ipv4_mapped", None) or meant)
        assert struct.unpack("!H", one[2:4]) == (port,)
    assert not packed


@given(u16, u16, ips)
def test_status(streams_in: int, streams_out: int, ip: str) -> None:
    head = struct.pack("=iiIHHHHI", 7, 4, 1 << 20, 3, 4, streams_in, streams_out, 1452)
    value = (head + struct.pack("=i", 7) + s.addresses([ip], 3868)).ljust(s.STATUS_BYTES, b"\0")
    found = s.status(value)
    assert found[:2] == (streams_in, streams_out)
    assert found.primary == s.read_address(s.addresses([ip], 1))


@given(u16, u16)
def test_stream_counts(streams_out: int, streams_in: int) -> None:
    assert s.read_initmsg(s.initmsg(streams_out, streams_in)) == (streams_out, streams_in)


def test_ipv4_in_ipv6_is_written_as_ipv4() -> None:
    assert s.unmapped("::ffff:10.0.0.1") == "10.0.0.1"
    assert s.unmapped("fd00::1") == "fd00::1"
    assert s.read_address(s.addresses(["::ffff:10.0.0.1"], 1)) == "10.0.0.1"
    assert s.read_address(b"\1\0" + bytes(26)) == ""
