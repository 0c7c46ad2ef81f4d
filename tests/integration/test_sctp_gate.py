"""SCTP Services where SCTP is off, and where the kernel has none: they say so, and everything else works."""

from __future__ import annotations

import errno
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import without_call
from tests.support.clients import ask
from tests.support.daemon import Proxyd
from tests.support.manifests import Document, endpoints, pod, service, write
from tests.support.netlab import POD_PORT, Lab
from tests.support.waiting import wait_for

VIP, MIXED = "10.96.0.10", "10.96.0.11"
NO_SCTP = "the kernel has no SCTP (modprobe sctp)"
SCTP_MODULES = ["proxyd.state.sctpsocket", "proxyd.host.sctp", "proxyd.control.reconcile.sctp_endpoints"]
STATES = {False: {"Disabled"}, True: {"Failed", "Serving"}}
Run = Callable[..., Proxyd]


def kernel_has_sctp() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError:
        return False
    return True


def sctp_service(name: str, vip: str, *ports: Document, **annotations: str) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"clusterIP": vip, "selector": {"app": "MyApp"}, "ports": [*ports]},
    }


DIAMETER = {"name": "diameter", "port": 3868, "protocol": "SCTP"}
HTTP = {"name": "http", "port": 80, "targetPort": POD_PORT}


def serve(manifests: Path, proxyd: Run, **options: object) -> Proxyd:
    """A daemon with a TCP Service, an SCTP Service of two addresses, and one of both protocols."""
    write(
        manifests / "all.yaml",
        service("web", "10.96.0.12"),
        endpoints("web", 1),
        sctp_service("hss", VIP, DIAMETER, **{"proxyd.io/sctp-addresses": "10.96.0.99"}),
        sctp_service("mixed", MIXED, DIAMETER, HTTP),
        pod(1),
    )
    return proxyd(**options)


def sctp_states(daemon: Proxyd) -> dict[str, str]:
    return {f"{one.ip}": f"{one.state}: {one.detail}" for one in daemon.listeners() if one.protocol == "SCTP"}


def events(daemon: Proxyd, text: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in daemon.log().splitlines()]
    return [line for line in lines if text in json.dumps(line)]


@pytest.mark.parametrize("workers", [0, 1])
def test_gate_off(lab: Lab, manifests: Path, proxyd: Run, workers: int) -> None:
    daemon = serve(manifests, proxyd, workers=workers)
    daemon.wait_listener(MIXED, 80)
    daemon.wait_listener("10.96.0.12", 80)
    disabled = "Disabled: SCTPSupport"
    assert sctp_states(daemon) == {VIP: disabled, MIXED: disabled, "10.96.0.99": disabled}
    assert ask(lab.client, MIXED, 80) == ask(lab.client, "10.96.0.12", 80) == "pod-1"
    assert "Disabled: SCTPSupport" in daemon.cli("get", "services").stdout
    # One line, however many Services and changes there are.
    write(manifests / "more.yaml", sctp_service("more", "10.96.0.13", DIAMETER))
    daemon.wait_listener("10.96.0.13", 3868, "Disabled")
    said = events(daemon, "SCTP")
    assert [line["event"] for line in said] == [
        "SCTP is off: --feature-gates=SCTPSupport=true serves these Services"
    ]
    assert said[0]["count"] == 2
    assert daemon.stop() == 0


def test_gate_on_without_sctp_in_the_kernel(lab: Lab, manifests: Path, proxyd: Run) -> None:
    # Whatever this kernel has: for this daemon it has no SCTP.
    before = (sys.executable, without_call.__file__, "sctp", str(errno.EPROTONOSUPPORT))
    daemon = serve(manifests, proxyd, flags=("--feature-gates=SCTPSupport=true",), before=before)
    daemon.wait_listener(MIXED, 80)
    daemon.wait_listener(VIP, 3868, "Failed")
    assert set(sctp_states(daemon).values()) == {f"Failed: {NO_SCTP}"}
    assert ask(lab.client, MIXED, 80) == ask(lab.client, "10.96.0.12", 80) == "pod-1"
    # Tried again, said once: not for each listener and attempt.
    tried = wait_for(lambda: daemon.status()["counters"], "an answer while it tries again")
    assert tried["opened"] == 2
    said = events(daemon, NO_SCTP)
    assert [line["event"] for line in said] == ["listeners failed"]
    assert said[0]["count"] == 3
    write(manifests / "all.yaml", service("web", "10.96.0.12"), endpoints("web", 1))
    daemon.wait_listeners(lambda found: {one.protocol for one in found} == {"TCP"}, "SCTP gone")
    assert ask(lab.client, "10.96.0.12", 80) == "pod-1"
    assert daemon.stop() == 0


def test_wrong_annotations_are_told(manifests: Path, proxyd: Run) -> None:
    write(manifests / "hss.yaml", sctp_service("hss", VIP, DIAMETER, **{"proxyd.io/sctp-addresses": "here"}))
    daemon = proxyd()
    daemon.wait_listener(VIP, 3868, "Disabled")
    problems = {problem["message"]: problem["severity"] for problem in daemon.status()["problems"]}
    assert problems['has no effect: expected IP addresses separated by commas, got "here"'] == "warning"


@pytest.mark.parametrize("gate", [False, True])
def test_sctp_code_is_imported_with_the_gate_alone(
    manifests: Path, proxyd: Run, monkeypatch: pytest.MonkeyPatch, gate: bool
) -> None:
    # Python writes down what it imports. One process, so that lines stay whole.
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    daemon = serve(manifests, proxyd, workers=0, flags=(f"--feature-gates=SCTPSupport={str(gate).lower()}",))
    daemon.wait_listener(MIXED, 80)
    daemon.wait_listeners(
        lambda found: all(one.state in STATES[gate] for one in found if one.protocol == "SCTP"),
        "states of SCTP",
    )
    assert daemon.stop() == 0
    log = daemon.log()
    assert "proxyd.relay.tcp.pump" in log  # as it relays TCP
    assert [name for name in SCTP_MODULES if name in log] == (SCTP_MODULES if gate else [])
    # Where nothing could be opened, no worker was given anything to relay.
    assert ("proxyd.relay.sctp.listener" in log) == (gate and kernel_has_sctp())
