"""Builds what is installed on a node without internet: a tarball and a Debian package, each with all that proxyd needs.

    python packaging/build.py [--deb] [--output dist]

Run by the project's virtual environment, whose installed packages (those of requirements.lock, checked by their hashes
when they were installed) are what goes into the files: nothing is fetched. A node needs the same minor version of
CPython, nothing else of Python's: no pip, no venv.
"""

from __future__ import annotations

import argparse
import gzip
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
MAINTAINER = "the proxyd authors <proxyd@localhost>"


def main() -> int:
    """Build; prints the path of each file made."""
    parser = argparse.ArgumentParser(description="Build what is installed on a node without internet.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", metavar="DIR")
    parser.add_argument("--deb", action="store_true", help="a Debian package too; needs dpkg-deb")
    parser.add_argument("--tree", type=Path, metavar="DIR", help="only make the tree of the tarball there")
    args = parser.parse_args()
    if args.tree:
        shutil.rmtree(args.tree, ignore_errors=True)
        make_tree(args.tree)
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="proxyd-build-") as scratch:
        machine = platform.machine()
        name = f"proxyd-{version()}-linux-{machine}-py{sys.version_info.major}{sys.version_info.minor}"
        tree = Path(scratch, name)
        make_tree(tree)
        print(make_tarball(tree, args.output / f"{name}.tar.gz"))
        if args.deb:
            print(make_deb(tree, Path(scratch, "deb"), args.output))
    return 0


def version() -> str:
    """Of proxyd."""
    text = (ROOT / "proxyd/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    assert found, "proxyd/__init__.py has no __version__"
    return found[1]


def project() -> dict[str, Any]:
    """The project's table in pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def make_tree(tree: Path) -> None:
    """The folder that the tarball holds: site-packages, units, configuration, documents, install.sh."""
    site = tree / "lib" / PYTHON / "site-packages"
    site.mkdir(parents=True)
    for name in needed():
        copy_installed(name, site)
    with tempfile.TemporaryDirectory(prefix="proxyd-wheel-") as scratch:
        wheel = next(WheelBuilder(str(ROOT)).build(directory=scratch))
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(site)  # noqa: S202 - our own wheel, built above
    # The service may not write: without these every start would compile. They are valid whatever the files' times.
    run(sys.executable, "-m", "compileall", "-q", "-s", site, "--invalidation-mode", "unchecked-hash", site)
    for folder in ("systemd", "docs"):
        shutil.copytree(ROOT / folder, tree / folder)
    shutil.copytree(ROOT / "config", tree / "config", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("install.sh", "uninstall.sh", "manifests-README"):
        shutil.copy(ROOT / "packaging" / file, tree)
    shutil.copy(ROOT / "LICENSE", tree)
    run(sys.executable, "-m", "proxyd.cli.manual", tree / "man")
    (tree / "completion").mkdir()
    for shell, name in (("bash", "proxyd"), ("zsh", "_proxyd"), ("fish", "proxyd.fish")):
        text = subprocess.run(
            [sys.executable, "-m", "proxyd", "completion", shell],
            check=True,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        ).stdout
        (tree / "completion" / name).write_bytes(text)
    (tree / "VERSION").write_text(f"{version()}\n", encoding="ascii")
    (tree / "PYTHON").write_text(f"{PYTHON}\n", encoding="ascii")
    (tree / "ENTRY").write_text(project()["scripts"]["proxyd"] + "\n", encoding="ascii")


def needed() -> set[str]:
    """All that proxyd needs to run on this platform, as canonical names."""
    found: set[str] = set()
    waiting: list[str] = list(project()["dependencies"])
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            waiting += metadata.requires(name) or ()
    return found


def copy_installed(name: str, site: Path) -> None:
    """Copy an installed distribution; it must be the version that requirements.lock names."""
    pinned = re.search(
        rf"^{name}==(\S+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE
    )
    installed = metadata.version(name)
    if pinned is None or pinned[1] != installed:
        wanted = pinned[1] if pinned else "none"
        raise SystemExit(
            f"{name} {installed} is installed and requirements.lock names {wanted}: run `make lock venv`"
        )
    for file in metadata.files(name) or ():
        if file.parts[0] == ".." or "__pycache__" in file.parts:
            continue  # commands, which are for development, and what is compiled anew
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(file.locate()), target)


def make_tarball(tree: Path, path: Path) -> Path:
    """The tree as a tarball; the same input gives the same bytes."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = "root"
        info.mtime = epoch()
        info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
        return info

    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=epoch()) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for entry in sorted([tree, *tree.rglob("*")]):
            tar.add(entry, arcname=str(entry.relative_to(tree.parent)), recursive=False, filter=plain)
    return path


def make_deb(tree: Path, root: Path, output: Path) -> Path:
    """A Debian package, made of what install.sh installs under /usr."""
    run(
        "sh",
        tree / "install.sh",
        env={**os.environ, "DESTDIR": str(root), "PREFIX": "/usr", "PYTHON": f"/usr/bin/{PYTHON}"},
    )
    architecture = subprocess.run(
        ["dpkg", "--print-architecture"], check=True, capture_output=True, text=True
    ).stdout.strip()
    control = root / "DEBIAN"
    control.mkdir()
    size = sum(file.lstat().st_size for file in root.rglob("*") if file.is_file()) // 1024
    (control / "control").write_text(
        f"""Package: proxyd
Version: {version()}
Architecture: {architecture}
Maintainer: {MAINTAINER}
Installed-Size: {size}
Section: net
Priority: optional
Depends: {PYTHON}, nftables
Recommends: systemd (>= 250)
Description: userspace service proxy driven by Kubernetes Services
 Reads Services and their endpoints, opens a listener for every address that
 clients may use, and forwards each connection to one of the endpoints.
""",
        encoding="utf-8",
    )
    (control / "conffiles").write_text(
        "/etc/default/proxyd\n/etc/proxyd/manifests/README\n", encoding="ascii"
    )
    for script in ("postinst", "prerm", "postrm"):
        shutil.copy(ROOT / "packaging" / f"debian-{script}", control / script)
        (control / script).chmod(0o755)
    path = output / f"proxyd_{version()}_{architecture}-{PYTHON}.deb"
    run("dpkg-deb", "--root-owner-group", "-Zxz", "--build", root, path, stdout=subprocess.DEVNULL)
    return path


def epoch() -> int:
    """The time that files get: of the last commit, or SOURCE_DATE_EPOCH."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    done = subprocess.run(
        ["git", "-C", ROOT, "log", "-1", "--format=%ct"], check=False, capture_output=True, text=True
    )
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip() else 0


def run(*words: str | Path, **options: Any) -> None:
    """Run a command that must succeed."""
    subprocess.run([str(word) for word in words], check=True, **options)


if __name__ == "__main__":
    sys.exit(main())
