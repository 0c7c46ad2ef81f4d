"""A cluster in the lab: an API server on the node, and two nodes that run proxyd against it.

node-1 is the lab's node, in zone za; node-2 is the lab's outside host, in zone zb.
"""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from tests.support.clients import ask
from tests.support.daemon import Proxyd
from tests.support.netlab import NODE_IP, POD_PORT, Lab, Namespace, pod_ip
from tests.support.paths import REPOSITORY
from tests.support.waiting import DEADLINE, wait_for

Body = dict[str, Any]

API_PORT = 6443
NODE_1, NODE_2 = "node-1", "node-2"
ZONES = {NODE_1: "za", NODE_2: "zb"}
CORE, DISCOVERY = "/api/v1", "/apis/discovery.k8s.io/v1"
GROUPS = {"endpointslices": DISCOVERY}


class Cluster:
    """A test API server, asked by tests as kubectl and the controllers would. What it holds survives a kill.

    Args:
        lab: it runs on its node.
        folder: for what it holds, and its kubeconfig.
        versions: of discovery.k8s.io; "": it has core Endpoints alone.
        pki: a folder with server.crt, server.key and token: it serves by TLS, those who have the token.
    """

    def __init__(
        self, lab: Lab, folder: Path, *, versions: str = "v1,v1beta1", pki: Path | None = None
    ) -> None:
        self.lab = lab
        self.folder = folder
        self._versions = versions
        self._pki = pki
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it, or start it again."""
        argv = [
            sys.executable,
            "-m",
            "tests.support.api_server",
            "--host",
            "0.0.0.0",
            "--port",
            str(API_PORT),
        ]
        argv += ["--versions", self._versions, "--state", str(self.folder / "objects")]
        if self._pki is not None:
            argv += ["--certificate", str(self._pki / "server.crt"), "--key", str(self._pki / "server.key")]
            argv += ["--token-file", str(self._pki / "token")]
        self._process = self.lab.node.popen(
            argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=REPOSITORY
        )
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        assert ready.startswith(b"ready"), ready
        return self

    def kill(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kubeconfig(self, ip: str = NODE_IP) -> Path:
        """A kubeconfig for it."""
        path = self.folder / "kubeconfig"
        server = f"http://{ip}:{API_PORT}"
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "lab", "cluster": {"server": server}}],
                    "users": [{"name": "proxyd", "user": {"token": "t"}}],
                    "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "proxyd"}}],
                    "current-context": "lab",
                }
            )
        )
        return path

    def proxyd(
        self, node: str, *flags: str, manifests: Iterable[Path] = (), folder: str = "", workers: int = 1
    ) -> Proxyd:
        """proxyd on a node; not started."""
        place: Namespace = {NODE_1: self.lab.node, NODE_2: self.lab.outside}[node]
        own = self.folder / (folder or node)
        own.mkdir(exist_ok=True)
        given = ("--kubeconfig", str(self.kubeconfig()), "--hostname-override", node, *flags)
        return Proxyd(place, own, *manifests, flags=given, workers=workers)

    # Objects

    def _request(self, method: str, path: str, body: Body | None) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        if self._pki is None:
            connection = http.client.HTTPConnection("127.0.0.1", API_PORT, timeout=DEADLINE)
        else:
            tls = ssl.create_default_context(cafile=self._pki / "ca.crt")
            connection = http.client.HTTPSConnection(NODE_IP, API_PORT, timeout=DEADLINE, context=tls)
            headers["Authorization"] = f"Bearer {(self._pki / 'token').read_text().strip()}"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def request(self, method: str, path: str, body: Body | None = None) -> Body:
        """One request, which has to succeed."""
        status, text = self.lab.node.call(self._request, method, path, body)
        assert status < 300, f"{method} {path}: {status} {text!r}"
        return dict(json.loads(text))

    @staticmethod
    def _path(kind: str, name: str = "") -> str:
        group = GROUPS.get(kind, CORE)
        place = "" if kind == "nodes" else "/namespaces/default"
        return f"{group}{place}/{kind}{'/' + name if name else ''}"

    def create(self, kind: str, body: Body) -> Body:
        """Create an object; `kind` is the plural, as in paths."""
        return self.request("POST", self._path(kind), body)

    def patch(self, kind: str, name: str, body: Body) -> Body:
        """Change an object by a merge patch."""
        return self.request("PATCH", self._path(kind, name), body)

    def replace(self, kind: str, name: str, body: Body) -> Body:
        """Put another body in an object's place."""
        body = {**body, "metadata": {**body["metadata"], "name": name, "namespace": "default"}}
        return self.request("PUT", self._path(kind, name), body)

    def delete(self, kind: str, name: str) -> Body:
        """Delete an object."""
        return self.request("DELETE", self._path(kind, name))

    def add_nodes(self) -> None:
        """Create both Nodes."""
        for name, zone in ZONES.items():
            labels = {"topology.kubernetes.io/zone": zone, "kubernetes.io/hostname": name}
            self.create("nodes", {"metadata": {"name": name, "labels": labels}})

    def serve(self, name: str, vip: str, *endpoints: Body, **spec: Any) -> None:
        """Create a Service and its slice."""
        self.create("services", service(name, vip, **spec))
        self.create("endpointslices", slice_of(name, *endpoints))

    def endpoints(self, name: str, *endpoints: Body, **more: Any) -> None:
        """Put other endpoints into the slice of a Service."""
        self.replace("endpointslices", f"{name}-1", slice_of(name, *endpoints, **more))


def service(name: str, vip: str = "", *, ports: list[Body] | None = None, **spec: Any) -> Body:
    """A Service as the API server has it; by default of port 80, named http."""
    if ports is None:
        ports = [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": POD_PORT}]
    status = {"loadBalancer": {"ingress": spec.pop("ingress", [])}}
    labels = spec.pop("labels", {})
    vips = {"clusterIP": vip, "clusterIPs": [vip]} if vip else {}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"ports": ports, **vips, **spec},
        "status": status,
    }


def slice_of(
    name: str,
    *endpoints: Body,
    number: int = 1,
    family: str = "IPv4",
    ports: list[Body] | None = None,
) -> Body:
    """Slice `number` of a Service."""
    return {
        "metadata": {"name": f"{name}-{number}", "labels": {"kubernetes.io/service-name": name}},
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": ports or [{"name": "http", "port": POD_PORT, "protocol": "TCP"}],
    }


def pod(number: int, *, node: str = NODE_1, ip: str = "", **fields: Any) -> Body:
    """Pod `number` of the lab as an endpoint; conditions by `ready=`, `serving=`, `terminating=`, hints by `zones=`, `nodes=`."""
    conditions = {key: fields.pop(key) for key in ("ready", "serving", "terminating") if key in fields}
    hints = {}
    if zones := fields.pop("zones", None):
        hints["forZones"] = [{"name": zone} for zone in zones]
    if nodes := fields.pop("nodes", None):
        hints["forNodes"] = [{"name": each} for each in nodes]
    return {
        "addresses": [ip or pod_ip(number)],
        "nodeName": node,
        "zone": ZONES[node],
        "conditions": {"ready": True, **conditions},
        **({"hints": hints} if hints else {}),
        **fields,
    }


def who(place: Namespace, ip: str, port: int = 80, count: int = 8) -> set[str]:
    """The pods that answer `count` connections; "" for one that is refused."""
    found = set()
    for _ in range(count):
        try:
            found.add(ask(place, ip, port, timeout=2))
        except ConnectionRefusedError:
            found.add("")
    return found


def wait_who(place: Namespace, ip: str, expected: set[str], port: int = 80) -> None:
    """Wait until exactly these pods answer; {""}: connections are refused."""

    def reached() -> bool:
        nonlocal seen
        try:
            seen = who(place, ip, port)
        except OSError as error:
            seen = {repr(error)}
        return seen == expected

    seen: set[str] = set()
    try:
        # After an outage the pause before the next try may be half a minute.
        wait_for(reached, "")
    except AssertionError:
        raise AssertionError(f"{ip}:{port} from {place.name}: {seen}, not {expected}") from None
