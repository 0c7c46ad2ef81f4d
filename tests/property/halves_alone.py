"""What two processes read together is what one reads alone. Run by test_halves in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyd.api.rules import Rules
from proxyd.sources.manifests import halves
from proxyd.sources.manifests.files import FileEntry, Stamp, survey
from proxyd.sources.manifests.source import ManifestSet, ManifestSource

SERVICE = "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n"
PORTS = "spec:\n  ports:\n  - name: a\n    port: 80\n    targetPort: {target}\n  - {{name: b, port: 53, protocol: UDP}}\n"
SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv6
ports: [{{name: a, port: 80}}]
endpoints: [{{addresses: ["FD00::1"], conditions: {{ready: false, serving: true}}, nodeName: n}}]
"""
ENDPOINTS = """\
apiVersion: v1
kind: Endpoints
metadata: {{name: {name}}}
subsets: [{{addresses: [{{ip: 10.0.0.1}}], ports: [{{port: 80}}]}}]
"""
POD = "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{a: ü}}}}\nstatus: {{podIP: 10.0.0.9}}\n"
BODIES = (
    SERVICE + PORTS,
    SERVICE + PORTS + "  type: NodePort\n  sessionAffinity: ClientIP\n  externalIPs: [192.0.2.1]\n",
    SERVICE + "spec: {{type: ExternalName, externalName: x.example}}\n",
    SERVICE + "spec: {{ports: [{{port: eighty}}]}}\n",
    SERVICE + "spec: {{ports: [{{port: 80, unknown: 1}}]}}\n",
    "apiVersion: v1\nkind: List\nitems:\n- {{apiVersion: v1, kind: Service, metadata: {{name: {name}}}}}\n",
    "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: {name}}}\n",
    SLICE,
    ENDPOINTS,
    POD,
    "{{ not yaml",
    "",
)
DOCUMENT = st.builds(
    lambda body, name, target: body.format(name=name, target=target),
    st.sampled_from(BODIES),
    st.sampled_from(["a", "b", "c", "d"]),
    st.sampled_from(["http", "8080"]),
)
FILE = st.tuples(st.sampled_from([".yaml", ".json"]), st.lists(DOCUMENT, max_size=6).map("---\n".join))


def read(root: Path, worthwhile: int) -> ManifestSet:
    with mock.patch.object(halves, "WORTHWHILE", worthwhile):
        source = ManifestSource([str(root)], Rules())
        found = source.scan()
        assert source.scan() is found
        return found


@settings(max_examples=60, deadline=None)
@given(st.lists(FILE, min_size=1, max_size=4))
def test_two_read_what_one_reads(files: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, (suffix, text) in enumerate(files):
            (Path(folder) / f"{number}{suffix}").write_text(text)
        assert read(Path(folder), 0) == read(Path(folder), 1 << 60)


def _entries(path: Path, count: int) -> tuple[FileEntry, ...]:
    path.write_text("---\n".join((SERVICE + PORTS).format(name=f"s{n}", target=80) for n in range(count)))
    return survey([str(path)]).files


def test_the_other_process_has_the_second_half_and_is_gone_after_it(tmp_path: Path) -> None:
    entries = _entries(tmp_path / "all.yaml", 10_000)
    other = halves.second_half(entries)
    if other is None:
        assert len(os.sched_getaffinity(0)) < 2
        return
    try:
        other.begin(Rules())
        with mock.patch.object(halves, "_PATIENCE", 20.0):
            assert 2_000 < len(other) < 8_000
        assert all(len(decoded.objects) == 1 and not decoded.problems for decoded in other.values())
    finally:
        other.close()
    assert all(
        "proxyd-manifests" not in str(link.readlink())
        for link in Path("/proc/self/fd").iterdir()
        if link.is_symlink()
    )


def test_without_it_everything_is_read_all_the_same(tmp_path: Path) -> None:
    entries = _entries(tmp_path / "all.yaml", 10_000)
    gone = FileEntry(str(tmp_path / "gone.yaml"), Stamp(0, 0, 1 << 20, 0, 0))
    other = halves.second_half((gone,))
    if other is not None:
        other.begin(Rules())
        assert len(other) == 0
        other.close()
    with mock.patch.object(os, "memfd_create", side_effect=OSError):
        assert halves.second_half(entries) is None
        assert len(ManifestSource([str(tmp_path)], Rules()).scan().services) == 10_000


@pytest.mark.parametrize("moment", ["while it is started", "while it is ended"])
def test_a_signal_that_raises_leaves_no_process(tmp_path: Path, moment: str) -> None:
    """As `interruptible` has it: SIGTERM ends the program from within whatever it does."""
    _entries(tmp_path / "all.yaml", 10_000)

    class Ended(BaseException):
        pass

    def end(_number: int, _frame: object) -> None:
        raise Ended

    def come() -> None:
        nonlocal due
        if due:
            due = False
            os.kill(os.getpid(), signal.SIGTERM)

    def kill_and_come(pid: int, number: int) -> None:
        kill(pid, number)
        if number == signal.SIGKILL:
            kill(os.getpid(), signal.SIGTERM)

    kill, due = os.kill, moment == "while it is started"
    # The system's call has not returned yet: the parent knows no pid.
    os.register_at_fork(after_in_parent=come)
    before = signal.signal(signal.SIGTERM, end)
    try:
        source = ManifestSource([str(tmp_path)], Rules())
        with contextlib.ExitStack() as stack:
            if not due:
                # Nobody waits for what the process finds: it runs when it is ended.
                stack.enter_context(mock.patch.object(ManifestSource, "_look", side_effect=lambda *_: 0))
                stack.enter_context(mock.patch.object(os, "kill", kill_and_come))
            stack.enter_context(pytest.raises(Ended))
            source.scan()
    finally:
        due = False
        signal.signal(signal.SIGTERM, before)
    assert not Path("/proc/thread-self/children").read_text().split()


def test_a_process_with_threads_is_not_copied(tmp_path: Path) -> None:
    entries = _entries(tmp_path / "all.yaml", 10_000)
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert halves.second_half(entries) is None
    finally:
        done.set()
        thread.join()
