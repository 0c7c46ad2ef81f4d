"""python without_call.py splice|sctp|ipv6 ERRNO COMMAND...: runs a command for which a system call fails.

splice: splice(2), as in a sandbox or on an old kernel; sctp: socket(2) for SCTP, as where the kernel has no SCTP; ipv6:
socket(2) for IPv6, likewise.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import struct
import sys

SPLICE, SOCKET = {"x86_64": (275, 41), "aarch64": (76, 198)}[platform.machine()]
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
# linux/bpf_common.h, linux/seccomp.h
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, FAIL_WITH = 0x7FFF0000, 0x00050000
NUMBER, FIRST_ARGUMENT, THIRD_ARGUMENT = 0, 16, 32  # where they are in struct seccomp_data


class Program(ctypes.Structure):
    """Struct sock_fprog."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def steps(call: str, error: int) -> list[tuple[int, int, int, int]]:
    """The filter: code, how far to jump where equal and where not, operand."""
    ending = [(RETURN, 0, 0, FAIL_WITH | error), (RETURN, 0, 0, ALLOW)]
    if call == "splice":
        return [(LOAD_WORD, 0, 0, NUMBER), (JUMP_IF_EQUAL, 0, 1, SPLICE), *ending]
    argument, value = {
        "sctp": (THIRD_ARGUMENT, socket.IPPROTO_SCTP),
        "ipv6": (FIRST_ARGUMENT, int(socket.AF_INET6)),
    }[call]
    return [
        (LOAD_WORD, 0, 0, NUMBER),
        (JUMP_IF_EQUAL, 0, 3, SOCKET),
        (LOAD_WORD, 0, 0, argument),
        (JUMP_IF_EQUAL, 0, 1, value),
        *ending,
    ]


def main() -> None:
    call, error, *command = sys.argv[1:]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps(call, int(error)))
    memory = ctypes.create_string_buffer(code, len(code))
    program = Program(len(code) // 8, ctypes.addressof(memory))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "no seccomp filter can be set")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
