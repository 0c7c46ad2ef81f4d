"""One machine: started for one command, which it runs, and ended with it."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.vm import setup
from tests.vm.cpio import Archive
from tests.vm.errors import VmError

# Until the command starts. Emulated it is about 4 s, more on a machine that is busy.
BOOT_SECONDS = {"kvm": 30.0, "tcg": 180.0}
# Without AVX, which is slower in emulation than the instructions it stands for: a fifth less CPU for Python.
_EMULATED_CPU = "Nehalem"
_PORTS = ("status", "stdout", "stderr")  # in this order: guest/start counts on it


class Machine:
    """A machine that runs a command in the current folder. Leaving the `with` block ends it.

    `stdout` and `stderr` are the reading ends of the command's output: whoever starts a machine has to read both, the
    command waits where they are full. QEMU dies with the thread that made it.

    Args:
        command: program and arguments.
        accel: "kvm", or "tcg", which is emulation.
        writable: folders of the host that the command may write; everything else it writes is dropped.
        environment: of the command; this process's own where none is given.
        folder: where the command starts; the current folder where none is given.
        memory: MiB.
        processors: how many.

    Raises:
        VmError: QEMU cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        accel: str = "tcg",
        writable: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        memory: int = 2048,
        processors: int = 2,
    ) -> None:
        self.accel = accel
        self.parts = setup.find()
        self._started = time.monotonic()
        self._said = b""
        self._running = False
        with contextlib.ExitStack() as cleanup:
            self._folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="proxyd-vm-")))
            folders = [path.resolve(strict=True) for path in writable]
            script = _script(
                command, folder or Path.cwd(), os.environ if environment is None else environment
            )
            self._write_initramfs(script, folders)
            words = cleanup.enter_context((self._folder / "qemu").open("wb"))
            ends = [os.pipe() for _ in _PORTS]
            try:
                argv = self._argv(folders, [write for _, write in ends], memory, processors)
                self._qemu = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *argv],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=words,
                    pass_fds=[write for _, write in ends],
                    start_new_session=True,
                )
            except OSError as error:
                for read, _ in ends:
                    os.close(read)
                raise VmError(f"QEMU was not started: {error}") from error
            finally:
                for _, write in ends:
                    os.close(write)
            self._status, self.stdout, self.stderr = (os.fdopen(read, "rb", 0) for read, _ in ends)
            self._cleanup = cleanup.pop_all()

    def _write_initramfs(self, script: str, folders: Sequence[Path]) -> None:
        archive = Archive()
        archive.file("command", script.encode("utf-8", "surrogateescape"))
        archive.file("writable", "".join(f"{path}\n" for path in folders).encode())
        # It holds the environment: for this user alone, as the folder it is in.
        (self._folder / "initramfs").write_bytes(self.parts.initramfs.read_bytes() + archive.data())

    def _argv(self, folders: Sequence[Path], pipes: Sequence[int], memory: int, processors: int) -> list[str]:
        kernel = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off random.trust_cpu=on rdinit=/init"
        argv = [
            *(setup.QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none"),
            *(
                "-machine",
                "q35",
                "-accel",
                self.accel,
                "-cpu",
                "host" if self.accel == "kvm" else _EMULATED_CPU,
            ),
            *("-smp", str(processors), "-m", str(memory)),
            *(
                "-kernel",
                str(self.parts.kernel),
                "-initrd",
                str(self._folder / "initramfs"),
                "-append",
                kernel,
            ),
            *(
                "-serial",
                f"file:{self._folder / 'console'}",
                "-device",
                "virtio-rng-pci",
                "-device",
                "virtio-serial-pci",
            ),
            *_share("root", Path("/"), ",readonly=on"),
        ]
        for number, folder in enumerate(folders):
            argv += _share(f"rw{number}", folder, "")
        for number, (name, pipe) in enumerate(zip(_PORTS, pipes, strict=True), 1):
            argv += [
                *("-add-fd", f"set={number},fd={pipe}"),
                *("-chardev", f"file,id={name},path=/dev/fdset/{number},append=on"),
                *("-device", f"virtserialport,nr={number},chardev={name}"),
            ]
        return argv

    def wait_started(self) -> None:
        """Wait until the command runs.

        Raises:
            VmError: it does not come to that.
        """
        line = self._line(self._started + BOOT_SECONDS[self.accel])
        if line is None:
            raise VmError(
                f"the machine ({self.accel}) did not start the command in {BOOT_SECONDS[self.accel]:.0f} s"
            )
        self._running = True

    def wait(self, deadline: float | None = None) -> int | None:
        """Wait for the command's end: its exit status, 128 and more for a signal; None at the deadline.

        Args:
            deadline: on the monotonic clock.

        Raises:
            VmError: the machine ended without the command.
        """
        if not self._running:
            self.wait_started()
        line = self._line(deadline)
        return None if line is None else int(line.removeprefix(b"exit "))

    def _line(self, deadline: float | None) -> bytes | None:
        """One line of what the guest tells about the command; None at the deadline."""
        while b"\n" not in self._said:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._status], [], [], left)[0]:
                return None
            data = self._status.read(4096)
            if not data:
                raise VmError(f"the machine ({self.accel}) ended: {self._last_words()}")
            self._said += data
        line, self._said = self._said.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        """Why it ended: what QEMU, the guest or its kernel said last."""
        self._qemu.wait()
        said = []
        for name in ("qemu", "console"):
            with contextlib.suppress(OSError):
                said += [
                    line
                    for line in (self._folder / name).read_text(errors="replace").splitlines()
                    if line.strip()
                ]
        told = [line for line in said if line.startswith(("vm: ", "qemu", setup.QEMU))] or said
        return re.sub(r"[^ -~]", "", told[-1]).strip() if told else "no reason was given"

    def kill(self) -> None:
        """End it. What it held is lost; what the command wrote before can still be read."""
        if self._qemu.poll() is None:
            self._qemu.kill()
        self._qemu.wait()

    def close(self) -> None:
        """End it, if it still runs, and close the outputs."""
        self.kill()
        for pipe in (self._status, self.stdout, self.stderr):
            pipe.close()
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _share(tag: str, folder: Path, options: str) -> list[str]:
    path = str(folder).replace(",", ",,")
    return [
        *("-fsdev", f"local,id={tag},path={path},security_model=none,multidevs=remap{options}"),
        *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    ]


def _script(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    """A shell script that runs the command in a folder with this environment."""
    names = [name for name in environment if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)]
    lines = [f"export {name}={shlex.quote(environment[name])}" for name in names]
    return "\n".join(
        [*lines, f"cd {shlex.quote(str(folder))} || exit 126", f"exec {shlex.join(command)}", ""]
    )


def usable_accel() -> str:
    """ "kvm" where a machine really boots with it, else "tcg".

    A device /dev/kvm alone says little: in a machine that is itself virtual it may open and boot nothing. So it is tried,
    once for each boot of this machine.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    remembered = setup.cache() / "accel"
    with contextlib.suppress(OSError, ValueError):
        known, accel = remembered.read_text().split()
        if known == boot and accel in BOOT_SECONDS:
            return accel
    accel = "kvm"
    try:
        with Machine(["true"], accel="kvm") as machine:
            machine.wait()
    except VmError:
        accel = "tcg"
    with contextlib.suppress(OSError):
        remembered.write_text(f"{boot} {accel}\n")
    return accel


def describe(accel: str, parts: setup.Parts) -> str:
    """One line about what a command runs in."""
    how = "KVM" if accel == "kvm" else "TCG, which is emulation and slow"
    return f"Linux {parts.version} under QEMU with {how}"
