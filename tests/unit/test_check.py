"""`proxyd check`: warnings with their places, its outputs, and what --explain says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from proxyd.cli.reading import read
from proxyd.control.config.options import planning_options
from proxyd.control.config.settings import Settings
from tests.support.commandline import Result, run
from tests.support.paths import REPOSITORY

FLAGS = ("--service-cluster-ip-range", "10.96.0.0/16", "--hostname-override", "node-1")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(text: str, *argv: str, name: str = "a.yaml") -> Result:
    """Check one file of the current folder."""
    Path(name).write_text(text)
    return run("check", *FLAGS, *argv, name)


def said(text: str, *argv: str, name: str = "a.yaml") -> list[str]:
    """The problems that are found, without the summary."""
    got = check(text, *argv, name=name)
    assert got.err == ""
    *problems, summary = got.out.splitlines()
    assert summary.startswith("checked 1 file")
    return problems


def service(name: str, spec: str = "", ports: str = "[{port: 80}]") -> str:
    return f"---\napiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n{spec}  ports: {ports}\n"


def endpoints(name: str, ip: str = "10.1.0.1") -> str:
    return (
        f"---\napiVersion: v1\nkind: Endpoints\nmetadata:\n  name: {name}\n"
        f"subsets:\n  - addresses: [{{ip: {ip}}}]\n    ports: [{{port: 80}}]\n"
    )


def pod(name: str, rest: str) -> str:
    return f"---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  labels: {{app: web}}\n{rest}"


# Warnings and where they are


def test_a_service_without_endpoints(here: Path) -> None:
    assert said(service("a")) == [
        "a.yaml:5:9: warning: Service default/a: no endpoints: connections will be refused"
    ]


def test_backends_without_their_service(here: Path) -> None:
    text = endpoints("a") + (
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: b-1\n"
        "  labels: {kubernetes.io/service-name: b}\naddressType: IPv4\nendpoints: []\n"
    )
    assert said(text) == [
        "a.yaml:5:9: warning: Endpoints default/a: there is no Service default/a: not used",
        "a.yaml:13:9: warning: EndpointSlice default/b-1: there is no Service default/b: not used",
    ]


def test_two_holders_of_an_address(here: Path) -> None:
    spec = "  type: NodePort\n  clusterIP: 10.96.0.7\n  externalIPs: [198.51.100.1, 198.51.100.7]\n"
    ports = "[{port: 80, nodePort: 30123}]"
    text = service("b", spec, ports) + endpoints("b") + service("a", spec, ports) + endpoints("a")
    held = "is held by Service default/a, which comes first: one must change"
    assert said(text) == [
        f"a.yaml:8:14: warning: Service default/b: spec.clusterIP: 10.96.0.7:80/TCP {held}",
        f"a.yaml:9:17: warning: Service default/b: spec.externalIPs[0]: 198.51.100.1:80/TCP {held}",
        f"a.yaml:9:31: warning: Service default/b: spec.externalIPs[1]: 198.51.100.7:80/TCP {held}",
        f"a.yaml:10:32: warning: Service default/b: spec.ports[0].nodePort: NodePort 30123/TCP {held}",
    ]
    # Who was created first keeps it.
    older = text.replace("  name: b\nspec", "  name: b\n  creationTimestamp: '2020-01-01T00:00:00Z'\nspec")
    assert all(
        "Service default/a: spec." in line and "held by Service default/b," in line for line in said(older)
    )


def test_flags_change_what_two_services_share(here: Path) -> None:
    text = (
        service("a", "  clusterIP: 10.96.0.7\n")
        + endpoints("a")
        + service("b", "  clusterIP: 10.97.0.7\n")
        + endpoints("b")
        + service("c", "  clusterIP: 127.96.0.7\n")
        + endpoints("c")
    )
    assert said(text) == []
    (line,) = said(text, "--vip-mode", "loopback")
    assert "Service default/c: spec.clusterIP: 127.96.0.7:80/TCP is held by Service default/a" in line
    assert said(text, "--vip-mode", "none") == []


def test_a_port_that_another_process_of_this_node_has(here: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        spec, ports = "  type: NodePort\n", f"[{{port: 80, nodePort: {port}}}]"
        text = service("a", spec, ports) + endpoints("a")
        flags = ("--service-node-port-range", "1024-65535")
        name = Path("/proc/self/comm").read_text().strip()
        place = "a.yaml:8:32: warning: Service default/a: spec.ports[0].nodePort"
        holder = f"{name} (pid {os.getpid()})"
        assert said(text, *flags) == [f"{place}: NodePort {port}/TCP is in use on this node by {holder}"]
        # A listener that is opened elsewhere only is in nobody's way.
        assert said(text, *flags, "--nodeport-addresses", "192.0.2.0/24") == []
    assert said(text, *flags) == []


def test_a_daemon_at_all_addresses_is_in_the_way_of_vips_that_are_bound(here: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = service("a", "  clusterIP: 10.96.0.7\n", f"[{{port: {port}}}]") + endpoints("a")
        name = Path("/proc/self/comm").read_text().strip()
        place = f"a.yaml:7:14: warning: Service default/a: spec.clusterIP: 10.96.0.7:{port}/TCP"
        assert said(text, "--vip-mode", "route", "--vip-listen", "bound") == [
            f"{place} is in use on this node by {name} (pid {os.getpid()})"
        ]
        assert said(text, "--vip-mode", "route") == []


def test_an_ipv6_socket_is_in_the_way_of_ipv4_unless_it_says_otherwise(here: Path) -> None:
    for v6only in (0, 1):
        with socket.socket(socket.AF_INET6) as taken:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
            taken.bind(("::", 0))
            taken.listen()
            ports = f"[{{port: {taken.getsockname()[1]}}}]"
            found = said(service("a", "  clusterIP: 127.96.0.7\n", ports) + endpoints("a"))
            assert len(found) == 1 - v6only


def test_nothing_is_bound(here: Path) -> None:
    (here / "a.yaml").write_text(service("a", "  type: NodePort\n  clusterIP: 127.96.0.7\n") + endpoints("a"))
    command = [
        "strace",
        "-f",
        "-e",
        "trace=bind,listen,openat",
        sys.executable,
        "-m",
        "proxyd",
        "check",
        "a.yaml",
    ]
    got = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert got.returncode == 0, got.stderr
    assert "a.yaml" in got.stderr
    binds = [line for line in got.stderr.splitlines() if "bind(" in line or "listen(" in line]
    assert all("AF_NETLINK" in line for line in binds)
    writes = [line for line in got.stderr.splitlines() if "O_CREAT" in line and "__pycache__" not in line]
    assert writes == []


def test_pods(here: Path) -> None:
    text = service("a", "  selector: {app: web}\n", "[{port: 80, targetPort: http}]")
    text += pod("waiting", "")
    text += pod("nameless", "status: {podIP: 10.1.0.2}\n")
    text += pod(
        "good",
        "spec: {containers: [{ports: [{name: http, containerPort: 8080}]}]}\nstatus: {podIP: 10.1.0.3}\n",
    )
    assert said(text) == [
        "a.yaml:5:9: warning: Service default/a: Pod default/nameless has no container port named http/TCP: left out for it",
        "a.yaml:13:9: warning: Pod default/waiting: has no status.podIP: left out",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (service("a", "  slector: {app: x}\n"), 'a.yaml:7:12: warning: Service default/a: spec.slector: unknown field "slector": did you mean selector?'),
        (service("a", "  clusterIp: 10.96.0.7\n"), 'a.yaml:7:14: warning: Service default/a: spec.clusterIp: unknown field "clusterIp": did you mean clusterIP?'),
        (service("a", "  session_affinity: ClientIP\n"), 'a.yaml:7:21: warning: Service default/a: spec[session_affinity]: unknown field "session_affinity": did you mean sessionAffinity?'),
        (service("a", "", "[{port: 80, tragetPort: 8080}]"), 'a.yaml:7:34: warning: Service default/a: spec.ports[0].tragetPort: unknown field "tragetPort": did you mean targetPort?'),
        (service("a").replace("spec:", "  lables: {app: x}\nspec:"), 'a.yaml:6:11: warning: Service default/a: metadata.lables: unknown field "lables": did you mean labels?'),
        (endpoints("a").replace("{port: 80}", "{port: 80, protcol: TCP}"), 'a.yaml:8:33: warning: Endpoints default/a: subsets[0].ports[0].protcol: unknown field "protcol": did you mean protocol?'),
    ],
)  # fmt: skip
def test_fields_that_are_mistyped(here: Path, text: str, line: str) -> None:
    assert line in said(text)


def test_fields_that_proxyd_does_not_use_are_no_mistakes(here: Path) -> None:
    text = service(
        "a", "  trafficDistribution: PreferClose\n  loadBalancerClass: x\n  somethingNew: 1\n"
    ) + endpoints("a")
    text += pod(
        "p",
        "  ownerReferences: []\n  generateName: p-\nspec:\n  hostNetwork: true\n  volumes: []\n  initContainers: []\n"
        "  containers: [{name: a, image: b, env: [], ports: [{containerPort: 1, hostPort: 2}]}]\n"
        "status: {hostIP: 10.1.0.9, startTime: '2024-01-01T00:00:00Z', conditions: [{type: Ready, status: 'True', reason: x}]}\n",
    )
    assert said(text) == []


def test_kinds_that_are_not_used(here: Path) -> None:
    text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: tcp-services}\ndata:\n  9000: 'default/a:80'\n  true: x\n"
    assert said(text + service("a") + endpoints("a")) == [
        "a.yaml:2:7: warning: ConfigMap tcp-services: kind ConfigMap (v1) is not used by proxyd: ignored"
    ]


def test_places_in_json(here: Path) -> None:
    item = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "a"},
        "spec": {"ports": [{"port": 80}]},
    }
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": [item]}, indent=1)
    (line,) = said(text, name="a.json")
    assert line == "a.json:9:13: warning: Service default/a: no endpoints: connections will be refused"


def test_places_in_a_large_document(here: Path) -> None:
    """Of a large document no tree is put together."""
    head = "apiVersion: v1\nkind: List\nitems:\n"
    items = [
        f"- apiVersion: v1\n  kind: Service\n  metadata: {{name: s{n}, labels: &l{n} {{a: b}}}}\n  spec: {{ports: [{{port: {port}}}]}}\n"
        for n, port in enumerate(["80"] * 3999 + ["x"])
    ]
    text = head + "".join(items)
    assert len(text) > 1 << 18
    got = check(text)
    lines = got.out.splitlines()
    assert lines[-2].startswith("a.yaml:16003:25: error: Service default/s3999: spec.ports[0].port: ")
    assert lines[0] == "a.yaml:6:20: warning: Service default/s0: no endpoints: connections will be refused"
    assert lines[-1] == "checked 1 file, 3,999 services: 1 error, 3,999 warnings"


# Output


BOTH = service("a") + service("b", "", "[{port: x}]")


def test_summary_and_quiet(here: Path) -> None:
    got = check(BOTH)
    assert got.code == 3
    assert got.out.splitlines()[-1] == "checked 1 file, 1 service: 1 error, 1 warning"
    assert len(got.out.splitlines()) == 3
    quiet = check(BOTH, "-q")
    assert quiet.code == 3
    assert (
        quiet.out
        == 'a.yaml:14:18: error: Service default/b: spec.ports[0].port: expected an integer, got "x"\n'
    )
    fine = check(service("a"), "-q")
    assert (fine.code, fine.out, fine.err) == (0, "", "")


def test_json_output(here: Path) -> None:
    got = check(BOTH, "-o", "json")
    assert got.code == 3
    answer = json.loads(got.out)
    assert answer["summary"] == {
        "files": 1, "services": 1, "endpoints": 0, "endpointslices": 0, "pods": 0, "errors": 1, "warnings": 1,
    }  # fmt: skip
    assert answer["problems"][1] == {
        "file": "a.yaml", "line": 14, "column": 18, "severity": "error", "subject": "Service default/b",
        "kind": "Service", "object": "default/b", "path": "spec.ports[0].port",
        "message": 'expected an integer, got "x"',
    }  # fmt: skip
    assert len(json.loads(check(BOTH, "-q", "-o", "json").out)["problems"]) == 1


def test_a_wrong_flag_is_a_mistake_of_usage(here: Path) -> None:
    got = check(BOTH, "--vip-mode", "magic")
    assert got.code == 2
    assert len(got.err.splitlines()) == 1


# Explain


def rows(text: str) -> list[list[str]]:
    """The cells of every table row."""
    return [[cell for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


EXPLAINED = (
    service("web", "  type: NodePort\n  clusterIP: 10.96.0.7\n  externalTrafficPolicy: Local\n  selector: {app: web}\n",
            "[{name: http, port: 80, targetPort: web, nodePort: 30123}]")
    + pod("a-good", "spec: {nodeName: node-1, containers: [{ports: [{name: web, containerPort: 8080}]}]}\nstatus: {podIP: 10.1.0.1}\n")
    + pod("b-elsewhere", "spec: {nodeName: node-2, containers: [{ports: [{name: web, containerPort: 8081}]}]}\nstatus: {podIP: 10.1.0.2}\n")
    + pod("c-not-ready", "spec: {containers: [{ports: [{name: web, containerPort: 8080}]}]}\n"
                         "status: {podIP: 10.1.0.3, conditions: [{type: Ready, status: 'False'}]}\n")
    + pod("d-ending", "  deletionTimestamp: '2024-01-01T00:00:00Z'\nspec: {containers: [{ports: [{name: web, containerPort: 8080}]}]}\n"
                      "status: {podIP: 10.1.0.4}\n")
    + pod("e-no-address", "")
    + pod("f-no-port", "status: {podIP: 10.1.0.6}\n")
    + pod("g-ended", "status: {podIP: 10.1.0.7, phase: Succeeded}\n")
    + pod("h-ipv6", "spec: {containers: [{ports: [{name: web, containerPort: 8080}]}]}\nstatus: {podIP: 'fd00::8'}\n")
    + "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: web-1\n"
      "  labels: {kubernetes.io/service-name: web}\naddressType: IPv4\nports: [{name: web, port: 80}]\n"
      "endpoints: [{addresses: [10.1.0.9]}]\n"
    + service("late", "  clusterIP: 10.96.0.8\n") + endpoints("late")
    + service("too-late", "  clusterIP: 10.96.0.8\n") + endpoints("too-late")
)  # fmt: skip


def test_explain_endpoints(here: Path) -> None:
    got = check(EXPLAINED, "--explain", "web", "-o", "json")
    assert (got.code, got.err) == (0, "")
    (answer,) = json.loads(got.out)["services"]
    reasons = {
        (item["policy"], item["target"].removeprefix("Pod default/") or item["address"]): (
            item["used"],
            item["reason"],
        )
        for item in answer["endpoints"]
    }
    everywhere = {
        "e-no-address": (False, "has no status.podIP"),
        "f-no-port": (False, "has no container port 'web' (TCP)"),
        "g-ended": (False, "its phase is Succeeded: it has ended"),
        "h-ipv6": (False, "IPv6: no IPv6 listener wants it"),
        "10.1.0.9": (False, "slice port 'web' does not match service port 'http'"),
    }
    local = "policy Local takes those of this node (node-1) only"
    assert reasons == {
        **{(policy, name): reason for policy in ("Cluster", "Local") for name, reason in everywhere.items()},
        ("Cluster", "a-good"): (True, "ready"),
        ("Cluster", "b-elsewhere"): (True, "ready"),
        ("Cluster", "c-not-ready"): (False, "not ready"),
        ("Cluster", "d-ending"): (False, "terminating: others are ready"),
        ("Local", "a-good"): (True, "ready"),
        ("Local", "b-elsewhere"): (False, f"on node node-2: {local}"),
        ("Local", "c-not-ready"): (False, f"on no node: {local}"),
        ("Local", "d-ending"): (False, f"on no node: {local}"),
    }
    used = [item["address"] for item in answer["endpoints"] if item["used"] and item["policy"] == "Cluster"]
    assert used == ["10.1.0.1:8080", "10.1.0.2:8081"]


def test_explain_listeners(here: Path) -> None:
    got = check(EXPLAINED, "--explain", "default/web", "--nodeport-addresses", "127.0.0.1/32")
    assert ["10.96.0.7:80/TCP", "ClusterIP", "http", "Serving"] in [
        [c.strip() for c in row] for row in rows(got.out)
    ]
    assert ["127.0.0.1:30123/TCP", "NodePort", "http", "Serving"] in [
        [c.strip() for c in row] for row in rows(got.out)
    ]
    got = check(EXPLAINED, "--explain", "too-late")
    assert "Conflict: 10.96.0.8:80/TCP is held by default/late" in got.out
    got = check(service("a", "  clusterIP: 10.96.0.7\n"), "--explain", "a")
    assert "10.96.0.7:80/TCP  ClusterIP  <none>  NoEndpoints" in got.out
    got = check(
        service("a", "  clusterIP: 10.96.0.7\n") + endpoints("a"), "--explain", "a", "--vip-mode", "none"
    )
    assert "Disabled: --vip-mode=none" in got.out


def test_explain_hints(here: Path) -> None:
    def item(ip: str, node: str) -> str:
        return f"  - {{addresses: [{ip}], hints: {{forNodes: [{{name: {node}}}]}}}}\n"

    text = service("a") + (
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a}\naddressType: IPv4\n"
        f"ports: [{{port: 80}}]\nendpoints:\n{item('10.1.0.1', 'node-1')}{item('10.1.0.2', 'node-2')}"
    )
    (answer,) = json.loads(check(text, "--explain", "a", "-o", "json").out)["services"]
    assert [(e["address"], e["used"], e["reason"]) for e in answer["endpoints"]] == [
        ("10.1.0.1:80", True, "ready"),
        ("10.1.0.2:80", False, "hinted for node-2"),
    ]


@pytest.mark.parametrize(
    ("spec", "note"),
    [
        ("  type: ExternalName\n  externalName: db.example\n", "it is an alias for db.example"),
        ("  clusterIP: None\n", "it is headless"),
        ("  selector: {app: web, tier: x}\n", "no Pod in namespace default has the labels app=web,tier=x"),
        ("", "its clusterIP was allocated for this check"),
    ],
)
def test_explain_notes(here: Path, spec: str, note: str) -> None:
    got = check(service("a", spec), "--explain", "a")
    assert got.code == 0
    assert note in got.out


def test_explain_a_service_in_error(here: Path) -> None:
    got = check(BOTH, "--explain", "b")
    assert got.code == 3
    assert "a.yaml:14:18: error: Service default/b" in got.out


def test_explain_a_service_that_is_not_there(here: Path) -> None:
    got = check(EXPLAINED, "--explain", "wbe")
    assert (got.code, got.out) == (1, "")
    assert got.err == "proxyd: error: there is no Service wbe in these manifests; did you mean default/web?\n"


# What is planned


def test_check_plans_with_the_options_of_a_daemon_that_has_every_right(here: Path) -> None:
    Path("a.yaml").write_text(
        service("hss", ports="[{port: 3868, protocol: SCTP}]").replace(
            "  name: hss\n", '  name: hss\n  annotations: {proxyd.io/sctp-addresses: "10.96.0.99"}\n'
        )
    )
    settings = Settings(
        feature_gates={"SCTPSupport": True},
        detect_local_mode="NodeCIDR",
        service_cluster_ip_range=("10.96.0.0/16",),
        vip_mode="auto",
    )
    reading = read(["a.yaml"], settings)
    assert reading.options == planning_options(settings)
    # Of an address in the service range the daemon makes a VIP, and Pods are told by their Node.
    assert "10.96.0.99" in reading.desired.host.vips
    assert reading.options.pods_by_node
