"""A small assembler of BPF: each method adds one instruction, and labels stand for places to jump to.

An instruction is eight bytes: opcode, registers, a 16-bit offset and a 32-bit immediate (RFC 9669). Register
r0 takes what a call returns, and is what the program returns. r1 to r5 are a call's arguments, which it
overwrites; r6 to r9 stay. r10 points to the end of the stack, which has 512 bytes.
"""

from __future__ import annotations

import struct
import sys
from enum import IntEnum


class R(IntEnum):
    """A register."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    FRAME = 10


# Sizes of loads and stores, as bits of the opcode.
_SIZES = {1: 0x10, 2: 0x08, 4: 0x00, 8: 0x18}
_LDX, _ST, _STX = 0x61, 0x62, 0x63  # BPF_MEM | class
_PSEUDO_MAP_FD = 1  # the source register of a load of 64 bits whose immediate is a map's descriptor


class Assembler:
    """Collects instructions, and makes a program of them."""

    def __init__(self) -> None:
        self._code: list[
            tuple[int, int, int, int | str, int]
        ] = []  # opcode, target, source, offset, immediate
        self._labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        """The next instruction is at this label."""
        if name in self._labels:
            raise ValueError(f"label {name} is there twice")
        self._labels[name] = len(self._code)

    def load(self, size: int, target: R, base: R, offset: int) -> None:
        """Target = the `size` bytes at base + offset, zero-extended."""
        self._add(_LDX | _SIZES[size], target, base, offset)

    def store(self, size: int, base: R, offset: int, source: R) -> None:
        """The `size` bytes at base + offset = source."""
        self._add(_STX | _SIZES[size], base, source, offset)

    def store_value(self, size: int, base: R, offset: int, value: int) -> None:
        """The `size` bytes at base + offset = value."""
        self._add(_ST | _SIZES[size], base, R.R0, offset, value)

    def move(self, target: R, source: R | int) -> None:
        """Target = source. A number is a value, an R is a register."""
        self._alu(0xB0, target, source)

    def add(self, target: R, source: R | int) -> None:
        """Target += source."""
        self._alu(0x00, target, source)

    def bit_or(self, target: R, source: R | int) -> None:
        """Target |= source."""
        self._alu(0x40, target, source)

    def shift_left(self, target: R, source: R | int) -> None:
        """Target <<= source."""
        self._alu(0x60, target, source)

    def from_network(self, bits: int, target: R) -> None:
        """The lowest `bits` (16, 32 or 64) of target from network order to this machine's."""
        self._add(0xDC, target, R.R0, 0, bits)

    def load_map(self, target: R, descriptor: int) -> None:
        """Target = a map, by its descriptor in this process. It takes the room of two instructions."""
        self._add(0x18, target, R(_PSEUDO_MAP_FD), 0, descriptor)
        self._add(0x00, R.R0, R.R0)

    def call(self, helper: int) -> None:
        """r0 = a function of the kernel, by its number in linux/bpf.h."""
        self._add(0x85, R.R0, R.R0, 0, helper)

    def jump(self, label: str) -> None:
        """Go to a label."""
        self._add(0x05, R.R0, R.R0, label)

    def jump_if_equal(self, left: R, value: int, label: str) -> None:
        """Go to a label if left == value."""
        self._add(0x15, left, R.R0, label, value)

    def jump_if_not(self, left: R, value: int, label: str) -> None:
        """Go to a label if left != value."""
        self._add(0x55, left, R.R0, label, value)

    def exit(self) -> None:
        """End with r0."""
        self._add(0x95, R.R0, R.R0)

    def __bytes__(self) -> bytes:
        """The program.

        Raises:
            ValueError: a jump to a label that is nowhere.
        """
        little = sys.byteorder == "little"
        found = bytearray()
        for at, (opcode, target, source, offset, immediate) in enumerate(self._code):
            if isinstance(offset, str):
                if offset not in self._labels:
                    raise ValueError(f"there is no label {offset}")
                offset = self._labels[offset] - at - 1  # noqa: PLW2901 - counted from the next instruction
            registers = source << 4 | target if little else target << 4 | source
            found += struct.pack("=BBhi", opcode, registers, offset, immediate)
        return bytes(found)

    def _alu(self, operation: int, target: R, source: R | int) -> None:
        """An operation of 64 bits (class 7); bit 0x08 says that its source is a register."""
        if isinstance(source, R):
            self._add(operation | 0x0F, target, source)
        else:
            self._add(operation | 0x07, target, R.R0, 0, source)

    def _add(self, opcode: int, target: R, source: R, offset: int | str = 0, immediate: int = 0) -> None:
        self._code.append((opcode, int(target), int(source), offset, immediate))
