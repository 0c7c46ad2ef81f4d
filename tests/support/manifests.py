"""Manifests that tests write: small objects, and atomic changes of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.support.netlab import POD_PORT, pod_ip
from tests.support.paths import DATA

Document = dict[str, Any]

SEED = DATA / "seed"
MYAPP_PODS = DATA / "pods" / "myapp.yaml"  # pod-1, pod-2 and pod-3 of the lab, labelled `app: MyApp`


def service(name: str, vip: str = "", *, node_port: int = 0, port: int = 80, **spec: Any) -> Document:
    """A Service without a selector (see `endpoints`), of type NodePort where a nodePort is given."""
    ports: Document = {"port": port, "targetPort": POD_PORT}
    if node_port:
        ports["nodePort"] = node_port
        spec = {"type": "NodePort", **spec}
    if vip:
        spec = {"clusterIP": vip, **spec}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"ports": [ports], **spec},
    }


def endpoints(name: str, *pods: int) -> Document:
    """The Endpoints of that Service: these pods of the lab."""
    return endpoints_at(name, *(pod_ip(number) for number in pods))


def endpoints_at(name: str, *addresses: str) -> Document:
    """The Endpoints of that Service: these addresses, at the pods' port."""
    subsets = (
        [{"addresses": [{"ip": ip} for ip in addresses], "ports": [{"port": POD_PORT}]}] if addresses else []
    )
    return {"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": name}, "subsets": subsets}


def slice6(name: str, *addresses: str) -> Document:
    """An EndpointSlice of that Service: these IPv6 addresses, at the pods' port."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-v6", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv6",
        "endpoints": [{"addresses": [ip]} for ip in addresses],
        "ports": [{"name": "", "port": POD_PORT, "protocol": "TCP"}],
    }


def pod(number: int, *, app: str = "MyApp", ready: bool = True) -> Document:
    """A Pod of the lab."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"pod-{number}", "labels": {"app": app}},
        "status": {
            "phase": "Running",
            "podIP": pod_ip(number),
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


def text(*documents: Document) -> str:
    """A YAML file of these documents (JSON is YAML)."""
    return "".join(f"---\n{json.dumps(document, indent=1)}\n" for document in documents)


def write(path: Path, *documents: Document | str) -> Path:
    """Replace a file at once, as editors do: a new file beside it, renamed over it."""
    content = "".join(each if isinstance(each, str) else text(each) for each in documents)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(content)
    beside.replace(path)
    return path


def seed_folder(folder: Path, name: str) -> Path:
    """A folder with one of the seed manifests as it stands, and the Pods."""
    folder.mkdir()
    shutil.copyfile(SEED / name, folder / name)
    shutil.copyfile(MYAPP_PODS, folder / "pods.yaml")
    return folder


def mount(folder: Path, files: dict[str, str]) -> None:
    """Put files into a folder as the kubelet mounts a ConfigMap, or swap them: `name -> ..data/name -> version`."""
    folder.mkdir(exist_ok=True)
    data = folder / "..data"
    old = data.readlink() if data.is_symlink() else None
    version = f"..version_{int(str(old).rsplit('_', 1)[1]) + 1 if old else 1}"
    (folder / version).mkdir()
    for name, content in files.items():
        (folder / version / name).write_text(content)
    beside = folder / "..data_tmp"
    beside.symlink_to(version)
    beside.replace(data)
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    for entry in folder.iterdir():
        if not entry.name.startswith("..") and entry.name not in files:
            entry.unlink()
    if old:
        shutil.rmtree(folder / old)
