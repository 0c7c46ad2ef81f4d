"""`python -m tests.vm COMMAND...`: run a command on a kernel that has SCTP, this one's own or a machine's."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO

from tests.vm.errors import VmError, has_sctp
from tests.vm.machine import Machine, describe, usable_accel
from tests.vm.setup import prepare

TIMEOUT, FAILED, USAGE = 124, 125, 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.vm",
        description="Run COMMAND as root in the current folder in a virtual machine whose kernel has SCTP. Its output and "
        f"exit status are passed on; {TIMEOUT} is a timeout, {FAILED} a machine that cannot be used.",
    )
    parser.add_argument("--setup", action="store_true", help="install and download what the machine needs")
    parser.add_argument("--always", action="store_true", help="use a machine even where this kernel has SCTP")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="end it then, boot included")
    parser.add_argument(
        "--rw", type=Path, action="append", default=[], metavar="DIR", help="let it write this folder"
    )
    parser.add_argument(
        "--accel", choices=("auto", "kvm", "tcg"), default="auto", help="default: kvm where it works"
    )
    parser.add_argument("--memory", type=int, default=2048, metavar="MIB")
    parser.add_argument("--quiet", action="store_true", help="do not say what is used")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if arguments.command[:1] == ["--"]:
        del arguments.command[0]
    if not arguments.command and not arguments.setup:
        parser.error("a command is needed")
    return arguments


def _copy(source: IO[bytes], target: int) -> None:
    while data := source.read(1 << 16):
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(target, view) :]
        except BrokenPipeError:
            os.kill(os.getpid(), signal.SIGPIPE)
            return


def _ended_by(number: int, _: object) -> None:
    sys.exit(128 + number)


def _say(text: str) -> None:
    print(f"vm: {text}", file=sys.stderr, flush=True)


def _run(arguments: argparse.Namespace) -> int:
    deadline = None if arguments.timeout is None else time.monotonic() + arguments.timeout
    accel = usable_accel() if arguments.accel == "auto" else arguments.accel
    with Machine(arguments.command, accel=accel, writable=arguments.rw, memory=arguments.memory) as machine:
        if not arguments.quiet:
            _say(describe(accel, machine.parts))
        copies = [
            threading.Thread(target=_copy, args=pair, daemon=True)
            for pair in ((machine.stdout, 1), (machine.stderr, 2))
        ]
        for copy in copies:
            copy.start()
        status = None
        try:
            status = machine.wait(deadline)
        finally:
            if status is None:
                machine.kill()
            for copy in copies:
                copy.join()
        if status is None:
            _say(f"ended after {arguments.timeout:g} s")
        return TIMEOUT if status is None else status


def main() -> int:
    """Run it; the exit status."""
    arguments = _arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, _ended_by)
    try:
        if has_sctp() and not arguments.always:
            if arguments.setup:
                return 0
            prefix = [] if arguments.timeout is None else ["timeout", "--signal=KILL", str(arguments.timeout)]
            command = [*prefix, *arguments.command]
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            with contextlib.suppress(OSError):
                os.execvp(command[0], command)
            _say(f"{command[0]}: not found")
            return 127
        if arguments.setup:
            prepare(_say)
            return 0
        return _run(arguments)
    except VmError as error:
        _say(str(error))
        return FAILED
    except OSError as error:
        _say(f"{error.filename or ''}: {error.strerror}".removeprefix(": "))
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
