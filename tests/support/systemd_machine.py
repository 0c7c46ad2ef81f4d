"""A machine of its own for systemd: namespaces in which it is process 1, with this machine's /usr and nothing else of it.

proxyd is installed in it as an operator would do it, by install.sh, without a network.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from tests.support.waiting import DEADLINE, wait_for

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
POD_IP = "192.0.2.1"

# In a cgroup, a mount and a network namespace of its own; the arguments are folders, see Machine.
_OUTER = r"""
set -eu
root=$1
mount --make-rprivate /
mount -t tmpfs tmpfs "$root"
mkdir "$root/cgroup"
mount -t cgroup2 cgroup2 "$root/cgroup"
mkdir "$root/cgroup/$5"
echo $$ >"$root/cgroup/$5/cgroup.procs"
umount "$root/cgroup"
exec unshare --cgroup --pid --fork --kill-child --ipc --uts --net sh -c "$6" sh "$@"
"""
_INNER = r"""
set -eu
root=$1 tree=$2 python=$3 shared=$4
cd "$root"
mkdir -p usr etc/systemd/system/proxyd.service.d proc sys dev/pts dev/shm run tmp var/lib root opt/python mnt shared old
mount --rbind /usr usr
for name in bin sbin lib lib32 lib64 libx32; do
    if [ -L "/$name" ]; then cp -P "/$name" .; elif [ -d "/$name" ]; then mkdir -p "$name"; mount --bind "/$name" "$name"; fi
done
mount -t tmpfs tmpfs usr/local
mount --bind "$python" opt/python
mount --bind "$tree" mnt
mount --bind "$shared" shared
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
for name in null zero full random urandom tty; do touch "dev/$name"; mount --bind "/dev/$name" "dev/$name"; done
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
cp /etc/ld.so.cache etc/
[ ! -d /etc/alternatives ] || cp -R /etc/alternatives etc/
echo 'root:x:0:0:root:/root:/bin/sh' >etc/passwd
printf 'root:x:0:\nproxyd-admin:x:997:operator\n' >etc/group
: >etc/machine-id
hostname node-1
cat >etc/systemd/system/machine.target <<END
[Unit]
Description=nothing but what a test starts
END
cat >etc/systemd/system/proxyd.service.d/test.conf <<END
[Unit]
DefaultDependencies=no
[Service]
WatchdogSec=4
StandardOutput=append:/shared/log
StandardError=append:/shared/log
END
ip link set lo up
ip address add 192.0.2.1/32 dev lo
pivot_root . old
umount -l /old
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
if [ ! -x "/usr/bin/$7" ]; then
    # Moved from its place it may look for its library elsewhere.
    export PYTHON="/opt/python/bin/$7" LD_LIBRARY_PATH=/opt/python/lib
    echo "Environment=LD_LIBRARY_PATH=/opt/python/lib" >>etc/systemd/system/proxyd.service.d/test.conf
fi
sh /mnt/install.sh
exec env -i container=test PATH="$PATH" "$(readlink -f /lib/systemd/systemd)" --system --unit=machine.target --show-status=no
"""


def real_root() -> bool:
    """Whether this is root of the machine, and not of a user namespace: cgroups are not for others."""
    return Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"] and os.geteuid() == 0


class Machine:
    """A booted machine. `shared` is its folder /shared.

    Args:
        folder: for its root and what is shared with it.
        tree: the unpacked tarball of proxyd.
    """

    def __init__(self, folder: Path, tree: Path) -> None:
        self.shared = folder / "shared"
        self.shared.mkdir()
        self.shared.chmod(0o755)
        self._root = folder / "root"
        self._root.mkdir()
        self._cgroup = f"proxyd-test-{os.getpid()}"
        # Used where /usr has none of this version; a service may not look into home folders, where it may lie.
        arguments = [str(part) for part in (self._root, tree, sys.base_prefix, self.shared, self._cgroup)]
        with (folder / "boot.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", _OUTER, "sh", *arguments, _INNER, PYTHON],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._boot_log = folder / "boot.log"
        self._backend: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        wait_for(self._booted, "systemd to answer")
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self._backend, self._process):
            if process is not None and process.poll() is None:
                if process is self._process:
                    # The end of a pid namespace's first process is that of all.
                    for pid in self._children():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                process.kill()
                process.wait()
        print(f"boot:\n{self._boot_log.read_text()}\nproxyd:\n{self.log()}")
        script = 'mount -t cgroup2 cgroup2 "$1" && find "$1/$2" -depth -type d -exec rmdir {} +'
        wait_for(
            lambda: (
                subprocess.run(
                    ["unshare", "--mount", "sh", "-c", script, "sh", self._root, self._cgroup],
                    capture_output=True,
                    check=False,
                ).returncode
                == 0
            ),
            "the cgroup to be empty",
        )

    @property
    def boot_log(self) -> str:
        """What was said before systemd ran: by install.sh."""
        return self._boot_log.read_text()

    def log(self) -> str:
        """What proxyd wrote."""
        log = self.shared / "log"
        return log.read_text() if log.exists() else ""

    def run(self, *words: str, timeout: float = DEADLINE) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine, as root."""
        (init,) = self._children()
        return subprocess.run(
            ["nsenter", f"--target={init}", "--all", "env", "-i",
             "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", *words],
            capture_output=True, text=True, check=False, timeout=timeout, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def ok(self, *words: str, timeout: float = DEADLINE) -> str:
        """The output of a command that must succeed."""
        done = self.run(*words, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def show(self, name: str) -> str:
        """A property of the service, as `systemctl show` says it."""
        return self.ok("systemctl", "show", "proxyd", "--value", "--property", name).strip()

    def serve(self, text: str, port: int) -> None:
        """Answer every connection to a port of POD_IP with a text."""
        script = (
            "import socket\n"
            f"listener = socket.create_server(('{POD_IP}', {port}))\n"
            "while True:\n"
            "    sock, _ = listener.accept()\n"
            f"    sock.sendall({text.encode()!r})\n"
            "    sock.close()\n"
        )
        (init,) = self._children()
        self._backend = subprocess.Popen(
            ["nsenter", f"--target={init}", "--net", sys.executable, "-c", script]
        )

    def ask(self, ip: str, port: int) -> str:
        """What is read from an address in the machine until its end; "" where it is refused."""
        script = (
            "import socket\n"
            f"sock = socket.create_connection(('{ip}', {port}), 5)\n"
            "print(sock.makefile().read(), end='')\n"
        )
        (init,) = self._children()
        done = subprocess.run(
            ["nsenter", f"--target={init}", "--net", sys.executable, "-c", script],
            capture_output=True, text=True, check=False, timeout=DEADLINE,
        )  # fmt: skip
        return done.stdout

    @contextlib.contextmanager
    def watch(self, ip: str, port: int) -> Iterator[Callable[[], list[str]]]:
        """Connect to an address over and over, beside a daemon that listens on that port of all addresses.

        What is yielded gives what came of each connection: "refused", "reached", or another error.
        """
        script = (
            "import socket, time\n"
            f"listener = socket.create_server(('0.0.0.0', {port}))\n"
            "while True:\n"
            "    sock = socket.socket()\n"
            "    sock.settimeout(1)\n"
            "    try:\n"
            f"        sock.connect(('{ip}', {port}))\n"
            "        print('reached', flush=True)\n"
            "    except ConnectionRefusedError:\n"
            "        print('refused', flush=True)\n"
            "    except OSError as error:\n"
            "        print(error, flush=True)\n"
            "    sock.close()\n"
            "    time.sleep(0.01)\n"
        )
        (init,) = self._children()
        output = self.shared / "watched"
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["nsenter", f"--target={init}", "--net", sys.executable, "-c", script], stdout=file
            )
        try:
            yield lambda: output.read_text().splitlines()
        finally:
            process.kill()
            process.wait()

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the control process."""
        self.ok("sh", "-c", f"kill -{number.name.removeprefix('SIG')} {self.show('MainPID')}")

    def _children(self) -> list[int]:
        pid = self._process.pid
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def _booted(self) -> bool:
        assert self._process.poll() is None, f"it did not boot:\n{self._boot_log.read_text()}"
        return bool(self._children()) and self.run("systemctl", "list-units").returncode == 0
