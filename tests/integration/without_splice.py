"""python without_splice.py ERRNO COMMAND...: runs a command whose splice(2) fails, as in a sandbox or on an old kernel."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

NR_SPLICE = {"x86_64": 275, "aarch64": 76}[platform.machine()]
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
# linux/bpf_common.h, linux/seccomp.h
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, FAIL_WITH = 0x7FFF0000, 0x00050000


class Program(ctypes.Structure):
    """Struct sock_fprog."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def main() -> None:
    steps = b"".join(
        struct.pack("=HBBI", *step)
        for step in (
            (LOAD_WORD, 0, 0, 0),  # the number of the call
            (JUMP_IF_EQUAL, 0, 1, NR_SPLICE),
            (RETURN, 0, 0, FAIL_WITH | int(sys.argv[1])),
            (RETURN, 0, 0, ALLOW),
        )
    )
    memory = ctypes.create_string_buffer(steps, len(steps))
    program = Program(len(steps) // 8, ctypes.addressof(memory))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "no seccomp filter can be set")
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
