"""What the machine is made of: Debian's kernel and an initramfs, taken out of packages that are not installed."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vm.cpio import Archive
from tests.vm.errors import VmError

REPOSITORY = Path(__file__).parent.parent.parent
QEMU = "qemu-system-x86_64"
# The cloud flavour of the kernel has no 9p.
KERNEL_PACKAGE = "linux-image-amd64"
SETUP = "run: make prerequisites (or python -m tests.vm --setup)"

_FIRST = ("crc32c_generic", "crc32c_intel")  # sctp asks for a checksum by name, not as a dependency
_NEEDED = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "sctp", "veth", "bridge")
# Not all of them are in every kernel. Programs that ask for a module do not find it in the machine, so what nft and ss
# use is loaded beforehand.
_USEFUL = (
    *("virtio_rng", "dummy", "sch_netem"),
    *("nf_tables", "nft_reject_inet", "nft_socket", "nft_fib_inet", "nft_limit", "nft_counter"),
    *("sctp_diag", "tcp_diag", "udp_diag", "unix_diag", "netlink_diag"),
)
_FORMAT = "1"  # of the cache; another one is made anew


@dataclass(frozen=True)
class Parts:
    """The files that a machine boots from, and the kernel's version."""

    kernel: Path
    initramfs: Path
    version: str


def cache() -> Path:
    """The folder that keeps them."""
    return Path(os.environ.get("PROXYD_VM_CACHE") or REPOSITORY / "build" / "vm")


def find() -> Parts:
    """What an earlier setup made.

    Raises:
        VmError: there is nothing, or QEMU is missing.
    """
    if platform.machine() != "x86_64":
        raise VmError(f"the test machine is x86_64, this one is {platform.machine()}: use a kernel with SCTP")
    if not shutil.which(QEMU):
        raise VmError(f"{QEMU} was not found; {SETUP}")
    try:
        kind, version = (cache() / "version").read_text().split()
    except (OSError, ValueError):
        raise VmError(f"no kernel in {cache()}; {SETUP}") from None
    if kind != _identity():
        raise VmError(f"the kernel in {cache()} was prepared for another version of the tests; {SETUP}")
    return Parts(cache() / "vmlinuz", cache() / "initramfs", version)


def prepare(say: Callable[[str], None]) -> Parts:
    """Install QEMU where it is missing, download the packages, and write the parts into the cache.

    Args:
        say: is told what is done, if there is anything to do.

    Raises:
        VmError: something could not be had.
    """
    try:
        return find()
    except VmError:
        pass
    if platform.machine() != "x86_64":
        return find()
    if not shutil.which("apt-get"):
        raise VmError("setup needs Debian's apt-get")
    say("preparing a virtual machine whose kernel has SCTP, for the tests of it")
    if not shutil.which(QEMU):
        _apt_install("qemu-system-x86")
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as name:
        folder = Path(name)
        for package in (_kernel_package(), "busybox-static"):
            _download(package, folder)
        for package_file in folder.glob("*.deb"):
            _run("dpkg-deb", "-x", str(package_file), str(folder / "root"))
        version = _assemble(folder / "root", folder)
        for part in ("vmlinuz", "initramfs"):
            (folder / part).replace(cache() / part)
    (cache() / "version").write_text(f"{_identity()} {version}\n")
    return find()


def _identity() -> str:
    """Changes with the scripts of the guest, which the initramfs holds, and with what is in it."""
    guest = Path(__file__).parent / "guest"
    text = "".join((guest / name).read_text() for name in ("init", "start"))
    return hashlib.sha256(" ".join([_FORMAT, *_FIRST, *_NEEDED, *_USEFUL, text]).encode()).hexdigest()[:16]


# apt


def _run(*argv: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a program; its standard output.

    Raises:
        VmError: it failed; with its last line.
    """
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
        )
    except OSError as error:
        raise VmError(f"{argv[0]}: {error.strerror}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()
        raise VmError(f"{' '.join(argv)}: {said[-1]}")
    return done.stdout


def _as_root() -> list[str] | None:
    if os.geteuid() == 0:
        return []
    if (
        shutil.which("sudo")
        and subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0
    ):
        return ["sudo", "-n"]
    return None


def _apt_update() -> None:
    prefix = _as_root()
    if prefix is not None:
        _run(*prefix, "apt-get", "-qq", "update")


def _apt_install(package: str) -> None:
    prefix = _as_root()
    if prefix is None:
        raise VmError(f"{package} is missing and this user may not install it: apt-get install {package}")
    _apt_update()
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    _run(*prefix, "apt-get", "-qq", "install", "--yes", "--no-install-recommends", package, env=quiet)


def _kernel_package() -> str:
    """The package that the newest kernel is in: it is what the metapackage depends on."""

    def depended_on() -> str | None:
        try:
            said = _run("apt-cache", "depends", "--important", KERNEL_PACKAGE)
        except VmError:
            return None
        found = re.search(r"Depends: (linux-image-\S+)", said)
        return found[1] if found else None

    package = depended_on()
    if package is None:
        _apt_update()
        package = depended_on()
    if package is None:
        raise VmError(
            f"apt knows no package {KERNEL_PACKAGE}: are Debian's sources configured, and apt-get update run?"
        )
    return package


def _download(package: str, folder: Path) -> None:
    # As root apt fetches as another user, who may not write here, warns about that and goes on.
    try:
        _run("apt-get", "-qq", "download", package, cwd=folder)
    except VmError:
        # The lists of packages are older than the archive, or not there yet.
        _apt_update()
        _run("apt-get", "-qq", "download", package, cwd=folder)


# The initramfs


def _assemble(root: Path, into: Path) -> str:
    """Write `vmlinuz` and `initramfs` from the unpacked packages; the kernel's version."""
    # Debian 12 has /lib/modules, later ones /usr/lib/modules.
    modules = next(
        (found for top in ("lib", "usr/lib") for found in (root / top / "modules").glob("*")), None
    )
    if modules is None:
        raise VmError("the kernel's package holds no modules")
    version = modules.name
    images = (root / "boot" / f"vmlinuz-{version}", modules / "vmlinuz")
    image = next((path for path in images if path.exists()), None)
    if image is None:
        raise VmError(f"the kernel's package holds no image of {version}")
    busybox = next((path for top in ("bin", "usr/bin") for path in (root / top).glob("busybox")), None)
    if busybox is None:
        raise VmError("the package busybox-static holds no busybox")
    shutil.copyfile(image, into / "vmlinuz")

    archive = Archive()
    for folder in ("bin", "dev", "proc", "sys", "modules", "scratch", "host", "new"):
        archive.folder(folder)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for name in ("init", "start"):
        archive.file(name, (Path(__file__).parent / "guest" / name).read_bytes(), 0o755)
    for number, (name, data) in enumerate(_modules(modules)):
        archive.file(f"modules/{number:03}-{name}.ko", data)
    (into / "initramfs").write_bytes(archive.data())
    return version


def _modules(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every module to load, each after those it depends on."""
    files = {_plain(path.name.partition(".ko")[0]): path for path in folder.rglob("*.ko*") if path.is_file()}
    try:
        listed = (folder / "modules.builtin").read_text().splitlines()
    except OSError:
        listed = []
    builtin = {_plain(Path(line).name.partition(".ko")[0]) for line in listed}
    done: set[str] = set()

    def with_dependencies(name: str) -> Iterator[tuple[str, bytes]]:
        if name in done or name in builtin:
            return
        done.add(name)
        if name not in files:
            raise VmError(f"this kernel ({folder.name}) has no module {name}")
        data = _read(files[name])
        for dependency in _dependencies(data):
            yield from with_dependencies(dependency)
        yield name, data

    for name in (*_FIRST, *_NEEDED, *_USEFUL):
        if name in _NEEDED or _plain(name) in files:
            yield from with_dependencies(_plain(name))


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix != ".ko":
        raise VmError(f"{path.name}: modules compressed this way cannot be read")
    return data


def _dependencies(module: bytes) -> Sequence[str]:
    """What a module's .modinfo section says: `depends=a,b`, ended by a zero byte."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [_plain(name) for name in found[1].decode().split(",") if name] if found else []
