"""An operator with kubectl: what is created, changed and deleted in the API server is what proxyd serves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support import manifests as written
from tests.support.clients import Load, refused
from tests.support.clusterlab import NODE_1, Cluster, pod, slice_of, wait_who
from tests.support.manifests import Document
from tests.support.netlab import NODE_IP, POD_PORT, Lab
from tests.support.waiting import DEADLINE, wait_for

KUBECTL = shutil.which("kubectl")
# `make test` installs it there; other systems may have no package of it.
DEBIAN = "\nID=debian\n" in "\n" + Path("/etc/os-release").read_text()
VIP = "10.96.0.10"
P1, P2, P3 = "pod-1", "pod-2", "pod-3"
NOBODY = {""}


def slices(name: str, *pods: int) -> Document:
    """The EndpointSlice of a Service with one port, which has no name."""
    made = slice_of(name, *map(pod, pods), ports=[{"name": "", "port": POD_PORT, "protocol": "TCP"}])
    return {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", **made}


class Operator:
    """kubectl on the node."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._kubeconfig = cluster.kubeconfig()

    def __call__(self, *words: str, given: Document | None = None) -> str:
        """Run one command and return what it wrote; it has to succeed."""
        assert KUBECTL is not None, "kubectl is missing: apt-get install kubernetes-client"
        done = self._cluster.lab.node.call(
            subprocess.run,
            [KUBECTL, *words],
            input=None if given is None else json.dumps(given),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE,
            check=False,
            env={**os.environ, "KUBECONFIG": str(self._kubeconfig), "HOME": str(self._cluster.folder)},
        )
        assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stdout}"
        return str(done.stdout)

    def create(self, document: Document) -> None:
        # The API server of these tests has no schemas.
        self("create", "--validate=false", "-f", "-", given=document)

    def patch(self, kind: str, name: str, change: dict[str, Any]) -> None:
        self("patch", kind, name, "--type=merge", "-p", json.dumps(change))


if KUBECTL is not None or DEBIAN:

    @pytest.mark.parametrize("kind", ["endpointslices", "endpoints"])
    def test_what_kubectl_creates_and_deletes_is_followed(lab: Lab, folder: Path, kind: str) -> None:
        new = kind == "endpointslices"
        versions, field, backends = (
            ("v1,v1beta1", "endpoints", slices) if new else ("", "subsets", written.endpoints)
        )
        suffix = "-1" if new else ""

        def change(*pods: int) -> None:
            kubectl.patch(kind, f"web{suffix}", {field: backends("web", *pods)[field]})

        with Cluster(lab, folder, versions=versions) as cluster:
            cluster.add_nodes()
            kubectl = Operator(cluster)
            with cluster.proxyd(NODE_1) as daemon:
                kubectl.create(written.service("web", VIP, node_port=30080))
                daemon.wait_listener(VIP, 80, "NoEndpoints")
                wait_who(lab.client, VIP, NOBODY)
                kubectl.create(backends("web", 1, 2))
                wait_who(lab.client, VIP, {P1, P2})
                wait_who(lab.outside, NODE_IP, {P1, P2}, 30080)
                with Load(lab.client, VIP, 80) as load:
                    change(3)
                    wait_who(lab.client, VIP, {P3})
                    change(1, 3)
                    wait_who(lab.client, VIP, {P1, P3})
                    load.wait_more(5)
                assert (load.outcome.refused, load.outcome.broken) == ([], [])
                kubectl("delete", kind, f"web{suffix}")
                wait_who(lab.client, VIP, NOBODY)
                kubectl.create(backends("web", 2))
                wait_who(lab.client, VIP, {P2})
                label = "service.kubernetes.io/service-proxy-name"
                kubectl("label", "service", "web", f"{label}=other")
                wait_for(lambda: not daemon.get("services"), "the Service to be left alone")
                kubectl("label", "service", "web", f"{label}-")
                wait_who(lab.client, VIP, {P2})
                kubectl("delete", "service", "web")
                wait_for(lambda: not daemon.get("services"), "the Service to be gone")
                wait_for(lambda: refused(lab.outside, NODE_IP, 30080), "its NodePort to close")
                wait_for(
                    lambda: VIP not in lab.node.run("ip", "route", "show", "table", "local"),
                    "its route to go",
                )
                # The same address for another Service, and both in one command.
                both = {
                    "apiVersion": "v1",
                    "kind": "List",
                    "items": [written.service("new", VIP), backends("new", 3)],
                }
                kubectl.create(both)
                wait_who(lab.client, VIP, {P3})
                assert "Starting" in kubectl("get", "events", "-o", "json")
