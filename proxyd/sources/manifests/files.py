"""Lists the files and folders that `--manifests PATH` stands for, with their stamps, and reads no file."""

# A scan handles thousands of names: pathlib takes ten times as long as os.path, and folds `a/..` away.
# ruff: noqa: PTH116

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

SUFFIXES = (".yaml", ".yml", ".json")
MAX_FILES = 100_000  # in all paths together; further ones are not read, which is one problem
MAX_FOLDERS = 20_000


class Stamp(NamedTuple):
    """Figures of a file of which at least one changes when its content does."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, info: os.stat_result) -> Stamp:
        """The stamp of the file that a stat result is about."""
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


class FileEntry(NamedTuple):
    """A manifest file: its path as the user would write it, and its stamp."""

    path: str
    stamp: Stamp


class Complaint(NamedTuple):
    """A path, and what is wrong with it in a few words."""

    path: str
    reason: str


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What there is below the configured paths.

    Attributes:
        files: in order of path. A file with two names is listed under the first one.
        unreadable: files, folders and configured paths that cannot be read: whether what they defined before
            is still there is not known.
        remarks: what else the user should know of a path.
        folders: the folders of the tree, by real path.
        shown: how paths of files in a folder begin, by the folder's real path.
        links: the visible symbolic links in the tree.
    """

    files: tuple[FileEntry, ...] = ()
    unreadable: tuple[Complaint, ...] = ()
    remarks: tuple[Complaint, ...] = ()
    folders: Mapping[str, Stamp] = {}
    shown: Mapping[str, str] = {}
    links: tuple[str, ...] = ()


def display(path: str) -> str:
    """A path as text that any terminal or log can take."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def survey(paths: Sequence[str]) -> Survey:
    """Lists the manifest files at and below `paths`.

    A path that is a file is taken whatever its suffix; a folder is searched recursively for `SUFFIXES`.
    Entries whose name starts with a dot are skipped, also the `..data` folders of a mounted ConfigMap, whose
    files are found by their visible names. Symbolic links are followed. Each real folder is visited once.
    """
    return _Surveyor().run(paths)


class _Surveyor:
    def __init__(self) -> None:
        self._files: dict[tuple[int, int], FileEntry] = {}
        self._unreadable: list[Complaint] = []
        self._remarks: list[Complaint] = []
        self._folders: dict[str, Stamp] = {}
        self._shown: dict[str, str] = {}
        self._links: list[str] = []
        self._visited: set[tuple[int, int]] = set()
        self._full = False
        self._current = ""  # the configured path that is being searched

    def run(self, paths: Sequence[str]) -> Survey:
        for path in dict.fromkeys(paths):
            self._current = path
            self._root(path)
        return Survey(
            files=tuple(sorted(self._files.values())),
            unreadable=tuple(self._unreadable),
            remarks=tuple(self._remarks),
            folders=self._folders,
            shown=self._shown,
            links=tuple(self._links),
        )

    def _root(self, path: str) -> None:
        try:
            info = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            self._unreadable.append(Complaint(path, "no such file or folder"))
        except (OSError, ValueError) as error:
            self._unreadable.append(Complaint(path, reason(error)))
        else:
            if stat.S_ISDIR(info.st_mode):
                self._folder(path, info, frozenset())
            else:
                self._file(path, info)

    def _folder(self, path: str, info: os.stat_result, above: frozenset[tuple[int, int]]) -> None:
        identity = (info.st_dev, info.st_ino)
        if identity in above:
            self._unreadable.append(Complaint(path, "the symbolic link leads back to a folder it is in"))
            return
        if identity in self._visited:
            return
        if len(self._visited) >= MAX_FOLDERS:
            self._stop(f"more than {MAX_FOLDERS} folders")
            return
        self._visited.add(identity)
        real = os.path.realpath(path)
        self._folders[real] = Stamp.of(info)
        self._shown[real] = path
        try:
            with os.scandir(path) as listing:
                entries = sorted((entry for entry in listing if entry.name[0] != "."), key=lambda e: e.name)
        except OSError as error:
            self._unreadable.append(Complaint(path, reason(error)))
            return
        above |= {identity}
        for entry in entries:
            if self._full:
                return
            self._entry(entry, above)

    def _entry(self, entry: os.DirEntry[str], above: frozenset[tuple[int, int]]) -> None:
        wanted = entry.name.endswith(SUFFIXES)
        try:
            link = entry.is_symlink()
            if link:
                self._links.append(entry.path)
            elif not wanted and not entry.is_dir(follow_symlinks=False):
                return  # without a stat: most entries that are no manifests end here
            info = entry.stat()
        except OSError as error:
            if wanted:
                missing = isinstance(error, FileNotFoundError)
                why = "the symbolic link leads nowhere" if missing else reason(error)
                if not missing or link:  # else it has been deleted meanwhile
                    self._unreadable.append(Complaint(entry.path, why))
            return
        if stat.S_ISDIR(info.st_mode):
            if wanted:
                self._remarks.append(Complaint(entry.path, "is a folder, not a file: read as a folder"))
            self._folder(entry.path, info, above)
        elif wanted:
            self._file(entry.path, info)

    def _file(self, path: str, info: os.stat_result) -> None:
        if not stat.S_ISREG(info.st_mode):
            self._unreadable.append(Complaint(path, f"is {_kind(info.st_mode)}, not a file"))
        elif len(self._files) >= MAX_FILES:
            self._stop(f"more than {MAX_FILES} files")
        else:
            stamp = Stamp.of(info)
            known = self._files.get(stamp[:2])
            if known is None or path < known.path:
                self._files[stamp[:2]] = FileEntry(path, stamp)

    def _stop(self, why: str) -> None:
        self._full = True
        self._unreadable.append(Complaint(self._current, f"{why}: the others are not read"))


def reason(error: Exception) -> str:
    """Why a file operation failed, in a few words without the path."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    return str(error)


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return name
    return "something else"
