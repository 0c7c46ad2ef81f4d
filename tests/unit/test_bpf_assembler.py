"""The assembler of BPF: instructions as the kernel reads them, and labels."""

from __future__ import annotations

import struct

import pytest

from proxyd.api.service import Protocol
from proxyd.host.bpf.assembler import Assembler, R
from proxyd.host.bpf.vip_lookup import key


def decoded(program: bytes) -> list[tuple[int, int, int, int, int]]:
    """Opcode, target, source, offset and immediate of each instruction, on a little-endian machine."""
    return [
        (opcode, registers & 15, registers >> 4, offset, immediate)
        for opcode, registers, offset, immediate in struct.iter_unpack("=BBhi", program)
    ]


def one(method: str, *arguments: object) -> tuple[int, int, int, int, int]:
    a = Assembler()
    getattr(a, method)(*arguments)
    return decoded(bytes(a))[0]


@pytest.mark.parametrize(
    ("method", "arguments", "expected"),
    [
        # Opcodes of RFC 9669, appendix A.
        ("load", (4, R.R7, R.R6, 8), (0x61, 7, 6, 8, 0)),
        ("load", (2, R.R1, R.R6, 36), (0x69, 1, 6, 36, 0)),
        ("load", (1, R.R8, R.R0, 0), (0x71, 8, 0, 0, 0)),
        ("load", (8, R.R1, R.FRAME, -8), (0x79, 1, 10, -8, 0)),
        ("store", (4, R.FRAME, -24, R.R1), (0x63, 10, 1, -24, 0)),
        ("store_value", (4, R.FRAME, -20, 7), (0x62, 10, 0, -20, 7)),
        ("move", (R.R6, R.R1), (0xBF, 6, 1, 0, 0)),
        ("move", (R.R0, 1), (0xB7, 0, 0, 0, 1)),
        ("add", (R.R2, -24), (0x07, 2, 0, 0, -24)),
        ("bit_or", (R.R1, R.R9), (0x4F, 1, 9, 0, 0)),
        ("shift_left", (R.R7, 24), (0x67, 7, 0, 0, 24)),
        ("from_network", (16, R.R1), (0xDC, 1, 0, 0, 16)),
        ("call", (124,), (0x85, 0, 0, 0, 124)),
        ("exit", (), (0x95, 0, 0, 0, 0)),
    ],
)
def test_an_instruction(
    method: str, arguments: tuple[object, ...], expected: tuple[int, int, int, int, int]
) -> None:
    assert one(method, *arguments) == expected


def test_jumps_are_counted_from_the_next_instruction() -> None:
    a = Assembler()
    a.label("start")
    a.jump_if_equal(R.R1, 2, "end")
    a.load_map(R.R1, 5)  # two instructions
    a.jump_if_not(R.R1, 3, "end")
    a.jump("start")
    a.label("end")
    a.exit()
    assert [offset for _, _, _, offset, _ in decoded(bytes(a))] == [4, 0, 0, 1, -5, 0]


def test_labels_that_are_wrong() -> None:
    a = Assembler()
    a.jump("nowhere")
    with pytest.raises(ValueError, match="there is no label nowhere"):
        bytes(a)
    a.label("here")
    with pytest.raises(ValueError, match="label here is there twice"):
        a.label("here")


def test_keys_tell_family_address_port_and_protocol() -> None:
    keys = {
        key("10.96.0.10"),
        key("10.96.0.10", 53, Protocol.UDP),
        key("10.96.0.10", 53, Protocol.TCP),
        key("10.96.0.11", 53, Protocol.TCP),
        key("a60:a::"),  # its first bytes are those of 10.96.0.10
        key("::"),
        key("0.0.0.0"),
    }
    assert len(keys) == 7
    assert {len(one) for one in keys} == {20}
    with pytest.raises(ValueError, match=r"10\.96\.0 is not an IP address"):
        key("10.96.0")
