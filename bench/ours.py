"""proxyd as the bench runs it: the whole program over a folder of manifests, VIPs by routes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import proxyd
from bench.net import OUR_RANGE
from bench.peers import ONE_SHOT_IDLE, Proxy, Service

ROOT = Path(__file__).parent.parent


class Proxyd(Proxy):
    """proxyd: control and workers."""

    name = "proxyd"
    net = OUR_RANGE
    live_change = "manifest"

    @classmethod
    def missing(cls) -> str:
        return ""

    @classmethod
    def version(cls) -> str:
        return proxyd.__version__

    def configure(self) -> list[str]:
        manifests = self.folder / "manifests"
        manifests.mkdir(exist_ok=True)
        for service in self.services.values():
            self._write(service)
        return [
            *(sys.executable, "-m", "proxyd", "run", "--manifests", str(manifests)),
            *("--workers", str(self.workers), "--service-cluster-ip-range", f"{OUR_RANGE}.0.0/16"),
            *("--admin-socket", str(self.folder / "admin.sock")),
            *("--state-file", str(self.folder / "state.json"), "--drain-timeout", "0"),
        ]

    def _write(self, service: Service) -> None:
        """Replace a Service's file, as an operator's tools do."""
        beside = self.folder / f".{service.name}.new"
        beside.write_text("".join(f"---\n{_yaml(each)}" for each in self._documents(service)))
        beside.rename(self.folder / "manifests" / f"{service.name}.yaml")

    def _documents(self, service: Service) -> list[dict[str, Any]]:
        host, port = self.address(service.name)
        protocol = service.protocol.upper()
        metadata: dict[str, Any] = {"name": service.name}
        if service.protocol == "udp":
            metadata["annotations"] = {
                "proxyd.io/udp-idle-timeout": ONE_SHOT_IDLE if service.one_shot else "10s"
            }
        target = service.targets[0][1]
        return [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": metadata,
                "spec": {
                    "clusterIP": host,
                    "ports": [{"port": port, "targetPort": target, "protocol": protocol}],
                },
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": f"{service.name}-a",
                    "labels": {"kubernetes.io/service-name": service.name},
                },
                "addressType": "IPv4",
                "ports": [{"port": target, "protocol": protocol}],
                "endpoints": [
                    {"addresses": [ip], "conditions": {"ready": True}} for ip, _ in service.targets
                ],
            },
        ]

    def reload(self, service: Service) -> Callable[[], object]:
        return lambda: self._write(service)

    def change(self, service: Service) -> None:
        self._write(service)


def _yaml(value: Any, indent: str = "") -> str:
    """A document in YAML's block style, as people write it."""
    lines = []
    for key, each in value.items():
        if isinstance(each, dict):
            lines.append(f"{indent}{key}:\n{_yaml(each, indent + '  ')}")
        elif isinstance(each, list):
            lines.append(f"{indent}{key}:\n")
            for item in each:
                text = (
                    _yaml(item, indent + "    ")
                    if isinstance(item, dict)
                    else f"{indent}    {json.dumps(item)}\n"
                )
                lines.append(f"{indent}  - {text[len(indent) + 4 :]}")
        else:
            word = each if isinstance(each, str) and each.replace("-", "").isalpha() else json.dumps(each)
            lines.append(f"{indent}{key}: {word}\n")
    return "".join(lines)
