"""Scanning manifests: what is in force after files came, changed, broke and went."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxyd.api.decode import Rules
from proxyd.api.meta import ObjectName
from proxyd.sources.manifests.source import ManifestSet, ManifestSource
from tests.support.opens import Opens

RULES = Rules(service_cidrs=("10.96.0.0/16",))


def service(name: str, port: int = 80) -> str:
    return (
        f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  ports:\n  - port: {port}\n"
    )


BROKEN = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  ports:\n  - port: eighty\n"
UNREADABLE = "---\nkind: [unclosed\n"


class Site:
    """A folder of manifests and a source that reads it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.root.mkdir()
        self.source = ManifestSource([str(root)], RULES)

    def write(self, name: str, *parts: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(parts))
        return path

    def scan(self) -> ManifestSet:
        return self.source.scan()

    def ports(self) -> dict[str, int]:
        """Port of each Service in force."""
        return ports(self.scan())


def ports(found: ManifestSet) -> dict[str, int]:
    return {name.name: item.spec.ports[0].port for name, item in found.services.items()}


def problems(found: ManifestSet) -> list[str]:
    return [str(problem) for problem in found.problems]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "m")


class TestWhatIsRead:
    def test_every_suffix_recursively_and_every_kind(self, site: Site) -> None:
        site.write("a.yaml", service("a"), service("b"))
        site.write("deep/er/c.yml", service("c"))
        site.write(
            "d.json",
            '{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"},"status":{"podIP":"10.244.0.1"}}',
        )
        site.write("ignored.txt", service("x"))
        site.write("e.yaml", "apiVersion: v1\nkind: Endpoints\nmetadata: {name: a}\nsubsets: []\n")
        site.write(
            "s.yaml",
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a-1}\naddressType: IPv4\nendpoints: []\n",
        )
        found = site.scan()
        assert ports(found) == {"a": 80, "b": 80, "c": 80}
        assert list(found.pods) == [ObjectName("default", "p")]
        assert list(found.endpoints) == [ObjectName("default", "a")]
        assert list(found.slices) == [ObjectName("default", "a-1")]
        assert found.files == 5
        assert found.complete
        assert found.problems == ()
        assert found.origins["Service", ObjectName("default", "c")] == f"{site.root}/deep/er/c.yml"

    def test_hidden_entries_are_skipped(self, site: Site) -> None:
        site.write(".hidden.yaml", service("x"))
        site.write(".git/x.yaml", service("x"))
        assert site.ports() == {}

    def test_a_mounted_configmap_is_read_by_its_visible_names_once(self, site: Site) -> None:
        site.write("..2026_01/a.yaml", service("a"))
        (site.root / "..data").symlink_to("..2026_01")
        (site.root / "a.yaml").symlink_to("..data/a.yaml")
        found = site.scan()
        assert ports(found) == {"a": 80}
        assert found.problems == ()
        site.write("..2026_02/a.yaml", service("a", 81))
        (site.root / "..tmp").symlink_to("..2026_02")
        (site.root / "..tmp").rename(site.root / "..data")
        assert site.ports() == {"a": 81}

    def test_one_file_by_two_names_is_one_file(self, site: Site) -> None:
        path = site.write("a.yaml", service("a"))
        (site.root / "b.yaml").symlink_to(path)
        os.link(path, site.root / "c.yaml")
        found = site.scan()
        assert (ports(found), found.files, found.problems) == ({"a": 80}, 1, ())
        path.unlink()
        assert site.ports() == {"a": 80}

    def test_a_file_given_by_name_needs_no_suffix(self, tmp_path: Path) -> None:
        path = tmp_path / "conf"
        path.write_text(service("a"))
        assert ports(ManifestSource([str(path)], RULES).scan()) == {"a": 80}

    def test_a_trailing_slash_changes_nothing(self, site: Site) -> None:
        site.write("a.yaml", service("a"))
        found = ManifestSource([f"{site.root}/"], RULES).scan()
        assert list(found.origins.values()) == [f"{site.root}/a.yaml"]


class TestReadingAgain:
    def test_only_what_changed_is_read(self, site: Site) -> None:
        for n in range(5000):
            (site.root / f"{n}.yaml").write_text(service(f"s{n}"))
        site.scan()
        deadline = time.monotonic() + 60
        with Opens(site.root) as opens:
            while True:  # until no file is so young that it might change under the same stamp
                opens.take()
                first = site.scan()
                if not opens.take():
                    break
                assert time.monotonic() < deadline
            assert site.scan() is first
            site.write("77.yaml", service("s77", 81))
            opens.take()
            found = site.scan()
            assert opens.take() == ["77.yaml"]
        assert found is not first
        assert ports(found)["s77"] == 81
        assert len(found.services) == 5000

    def test_a_touched_file_changes_nothing(self, site: Site) -> None:
        path = site.write("a.yaml", service("a"))
        first = site.scan()
        os.utime(path, ns=(1, 1))
        assert site.scan() is first

    def test_two_edits_of_one_size_within_one_tick_of_the_clock(self, site: Site) -> None:
        for port in range(10, 60):
            site.write("a.yaml", service("a", port))
            assert site.ports() == {"a": port}

    def test_rename_over_is_an_edit(self, site: Site) -> None:
        site.write("a.yaml", service("a"))
        site.scan()
        site.write("a.yaml.tmp", service("a", 81)).rename(site.root / "a.yaml")
        assert site.ports() == {"a": 81}

    def test_a_deleted_file_drops_its_objects(self, site: Site) -> None:
        site.write("a.yaml", service("a"))
        gone = site.write("sub/b.yaml", service("b"))
        site.scan()
        gone.unlink()
        gone.parent.rmdir()
        found = site.scan()
        assert (ports(found), found.problems, found.complete) == ({"a": 80}, (), True)

    def test_a_renamed_file_keeps_its_objects(self, site: Site) -> None:
        path = site.write("a.yaml", service("a"))
        site.scan()
        path.rename(site.root / "z.yaml")
        found = site.scan()
        assert (ports(found), found.problems) == ({"a": 80}, ())


class TestErrors:
    def test_a_rejected_object_keeps_its_good_version_and_the_rest_works(self, site: Site) -> None:
        site.write("a.yaml", service("web"), service("b"))
        site.scan()
        site.write("a.yaml", BROKEN, service("b", 81))
        found = site.scan()
        assert ports(found) == {"web": 80, "b": 81}
        assert found.rejected == frozenset()
        assert any("Service default/web" in line and "eighty" in line for line in problems(found))
        assert any("warning: in force as before: Service default/web" in line for line in problems(found))
        site.write("a.yaml", service("b", 81))
        assert site.ports() == {"b": 81}

    def test_a_rejected_object_without_a_good_version_is_named(self, site: Site) -> None:
        site.write("a.yaml", BROKEN, service("b"))
        found = site.scan()
        assert ports(found) == {"b": 80}
        assert found.rejected == {ObjectName("default", "web")}
        assert len(found.problems) == 1

    def test_an_unparsable_document_keeps_what_the_file_had(self, site: Site) -> None:
        site.write("a.yaml", service("web"), service("b"))
        site.scan()
        site.write("a.yaml", service("b", 81), UNREADABLE)
        found = site.scan()
        assert ports(found) == {"web": 80, "b": 81}
        assert not found.complete
        site.write("a.yaml", service("b", 81))
        found = site.scan()
        assert ports(found) == {"b": 81}
        assert found.complete

    def test_a_renamed_file_with_an_error_keeps_the_version_in_force(self, site: Site) -> None:
        path = site.write("a.yaml", service("web"))
        site.scan()
        path.unlink()
        site.write("b.yaml", BROKEN)
        assert site.ports() == {"web": 80}

    def test_an_emptied_file_is_taken_for_one_being_written(self, site: Site) -> None:
        path = site.write("a.yaml", service("web"))
        site.scan()
        path.write_text("")
        found = site.scan()
        assert ports(found) == {"web": 80}
        assert len(found.problems) == 1
        assert site.scan() is found
        path.write_text("# nothing any more\n")
        found = site.scan()
        assert (ports(found), found.problems) == ({}, ())

    def test_the_first_file_wins_and_the_other_is_told(self, site: Site) -> None:
        site.write("a.yaml", service("web", 1))
        site.write("b.yaml", service("web", 2))
        found = site.scan()
        assert ports(found) == {"web": 1}
        assert problems(found) == [
            f"{site.root}/b.yaml: error: Service default/web: already defined in {site.root}/a.yaml"
        ]

    def test_a_holder_in_force_keeps_it_against_an_earlier_name(self, site: Site) -> None:
        holder = site.write("m.yaml", service("web", 1))
        site.scan()
        site.write("a.yaml", service("web", 2))
        found = site.scan()
        assert ports(found) == {"web": 1}
        assert f"{site.root}/a.yaml: error" in problems(found)[0]
        holder.write_text(service("web", 3))
        assert site.ports() == {"web": 3}
        holder.unlink()
        found = site.scan()
        assert (ports(found), found.problems) == ({"web": 2}, ())


class TestPaths:
    def test_a_vanished_root_keeps_what_was_in_force(self, site: Site) -> None:
        site.write("sub/a.yaml", service("web"))
        site.scan()
        site.root.rename(site.root.with_name("away"))
        found = site.scan()
        assert ports(found) == {"web": 80}
        assert problems(found) == [
            f"{site.root}: error: no such file or folder: what it defined stays in force"
        ]
        assert found.missing == (str(site.root),)
        assert not found.complete
        assert site.scan() is found
        site.root.mkdir()
        found = site.scan()
        assert (ports(found), found.problems, found.missing) == ({}, (), ())

    def test_a_vanished_root_file_too(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_text(service("web"))
        source = ManifestSource([str(path)], RULES)
        source.scan()
        path.unlink()
        found = source.scan()
        assert ports(found) == {"web": 80}
        assert problems(found) == [f"{path}: error: no such file or folder: what it defined stays in force"]

    def test_a_root_that_was_never_there(self, tmp_path: Path) -> None:
        found = ManifestSource([str(tmp_path / "x")], RULES).scan()
        assert problems(found) == [f"{tmp_path}/x: error: no such file or folder"]
        assert found.missing == (f"{tmp_path}/x",)

    def test_what_is_not_a_file_is_one_line_and_never_blocks(self, site: Site) -> None:
        site.write("good.yaml", service("good"))
        os.mkfifo(site.root / "fifo.yaml")
        (site.root / "nowhere.yaml").symlink_to("gone")
        (site.root / "loop.yaml").symlink_to("loop.yaml")
        (site.root / "folder.yaml").mkdir()
        site.write("folder.yaml/in.yaml", service("inside"))
        (site.root / "back").symlink_to(".")
        (site.root / "null.yaml").symlink_to("/dev/null")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(site.root / "socket.yaml"))
            found = site.scan()
        assert ports(found) == {"good": 80, "inside": 80}
        assert [line.removeprefix(f"{site.root}/") for line in problems(found)] == [
            "back: error: the symbolic link leads back to a folder it is in",
            "fifo.yaml: error: is a FIFO, not a file",
            "folder.yaml: warning: is a folder, not a file: read as a folder",
            "loop.yaml: error: too many levels of symbolic links",
            "nowhere.yaml: error: the symbolic link leads nowhere",
            "null.yaml: error: is a device, not a file",
            "socket.yaml: error: is a socket, not a file",
        ]

    def test_a_fifo_as_root(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "f")
        assert problems(ManifestSource([str(tmp_path / "f")], RULES).scan()) == [
            f"{tmp_path}/f: error: is a FIFO, not a file"
        ]

    def test_a_file_that_became_a_fifo_keeps_what_it_defined(self, site: Site) -> None:
        path = site.write("a.yaml", service("web"))
        site.scan()
        path.unlink()
        os.mkfifo(path)
        found = site.scan()
        assert ports(found) == {"web": 80}
        assert problems(found) == [f"{path}: error: is a FIFO, not a file: what it defined stays in force"]

    def test_folders_that_lead_to_each_other_end(self, site: Site) -> None:
        for n in range(12):
            site.write(f"d{n}/{n}.yaml", service(f"s{n}"))
            for other in range(12):
                (site.root / f"d{n}" / f"to{other}").symlink_to(f"../d{other}")
        assert len(site.ports()) == 12

    def test_too_large_a_file_is_not_read(self, site: Site) -> None:
        path = site.write("a.yaml", service("web"))
        site.scan()
        os.truncate(path, (64 << 20) + 1)
        found = site.scan()
        assert ports(found) == {"web": 80}
        assert problems(found) == [
            f"{path}: error: not read: it is over 64 MiB: what it defined stays in force"
        ]

    def test_a_name_that_is_not_utf8(self, site: Site) -> None:
        (site.root / os.fsdecode(b"\xff.yaml")).write_text(service("web"))
        found = site.scan()
        assert list(found.origins.values()) == [f"{site.root}/\\xff.yaml"]


class TestPermissions:
    @pytest.fixture
    def open_site(self) -> Iterator[Site]:
        # pytest's folders are for their owner only.
        root = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
        root.chmod(0o755)
        yield Site(root / "m")
        subprocess.run(["rm", "-rf", str(root)], check=True)

    def scan_unprivileged(self, site: Site) -> ManifestSet:
        if os.geteuid() != 0:
            return site.scan()
        os.seteuid(65534)
        try:
            return site.scan()
        finally:
            os.seteuid(0)

    def test_a_file_that_cannot_be_read(self, open_site: Site) -> None:
        path = open_site.write("a.yaml", service("web"))
        other = open_site.write("b.yaml", service("b"))
        assert ports(self.scan_unprivileged(open_site)) == {"web": 80, "b": 80}
        other.write_text(service("b", 81))
        path.chmod(0)
        found = self.scan_unprivileged(open_site)
        assert ports(found) == {"web": 80, "b": 81}
        assert problems(found) == [f"{path}: error: permission denied: what it defined stays in force"]
        path.chmod(0o644)
        found = self.scan_unprivileged(open_site)
        assert (ports(found), found.problems) == ({"web": 80, "b": 81}, ())

    def test_a_folder_that_cannot_be_listed(self, open_site: Site) -> None:
        open_site.write("sub/deep/a.yaml", service("web"))
        self.scan_unprivileged(open_site)
        (open_site.root / "sub").chmod(0)
        found = self.scan_unprivileged(open_site)
        assert ports(found) == {"web": 80}
        assert problems(found) == [
            f"{open_site.root}/sub: error: permission denied: what it defined stays in force"
        ]
        (open_site.root / "sub").chmod(0o755)
        assert self.scan_unprivileged(open_site).problems == ()


def test_a_service_in_error_in_one_file_is_not_rejected_while_another_file_has_it(site: Site) -> None:
    site.write("broken.yaml", BROKEN)
    assert site.scan().rejected == {ObjectName("default", "web")}
    good = site.write("good.yaml", service("other"))
    site.scan()
    good.write_text(service("web", 8080))
    found = site.source.scan(frozenset({str(good)}))
    assert ports(found) == {"web": 8080}
    assert found.rejected == frozenset()
    good.write_text(service("other", 8080))
    found = site.source.scan(frozenset({str(good)}))
    assert ports(found) == {"other": 8080}
    assert found.rejected == {ObjectName("default", "web")}
