"""What is shipped for clusters: the manifests ask for no more than they need, and their command line is one that is taken."""

from __future__ import annotations

import io
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxyd.cli.env import Env
from proxyd.cli.main import main
from proxyd.control.config.flags import FLAGS
from proxyd.control.config.kube_flags import ALIASES, FOREIGN
from proxyd.sources.cluster import load_access
from tests.support.paths import REPOSITORY

FOLDER = REPOSITORY / "config" / "kubernetes"
GUIDE = REPOSITORY / "docs" / "replace-kube-proxy.md"
# What the role system:node-proxier allows: kubernetes plugin/pkg/auth/authorizer/rbac/bootstrappolicy/policy.go
NODE_PROXIER = {
    *((("", kind), verb) for kind in ("services", "endpoints") for verb in ("list", "watch")),
    *((("discovery.k8s.io", "endpointslices"), verb) for verb in ("list", "watch")),
    *((("", "nodes"), verb) for verb in ("get", "list", "watch")),
    *(((group, "events"), verb) for group in ("", "events.k8s.io") for verb in ("create", "patch", "update")),
}


def documents() -> list[dict[str, Any]]:
    files = sorted(FOLDER.glob("*.yaml"))
    assert len(files) >= 4
    return [document for path in files for document in yaml.safe_load_all(path.read_text())]


def one(kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents() if document["kind"] == kind]
    return found


def test_every_manifest_is_an_object_of_kube_system():
    for document in documents():
        if document["kind"] == "Kustomization":
            assert {FOLDER / name for name in document["resources"]} <= set(FOLDER.glob("*.yaml"))
            continue
        assert document["apiVersion"]
        assert document["metadata"]["name"]
        assert document["kind"] == "ClusterRoleBinding" or document["metadata"]["namespace"] == "kube-system"


def test_nothing_is_allowed_but_what_kube_proxy_may():
    binding = one("ClusterRoleBinding")
    assert binding["roleRef"] == {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "ClusterRole",
        "name": "system:node-proxier",
    }
    account = one("ServiceAccount")["metadata"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", **account}]
    roles = [document for document in documents() if document["kind"] in {"Role", "ClusterRole"}]
    asked = {
        ((group, kind), verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for kind in rule["resources"]
        for verb in rule["verbs"]
    }
    assert asked <= NODE_PROXIER


def test_the_daemonset_has_the_node_s_network_and_few_rights():
    spec = one("DaemonSet")["spec"]
    pod = spec["template"]["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    assert pod["hostNetwork"] is True
    assert pod["serviceAccountName"] == one("ServiceAccount")["metadata"]["name"]
    assert pod["terminationGracePeriodSeconds"] > 25  # --drain-timeout
    (container,) = pod["containers"]
    context = container["securityContext"]
    assert (context["privileged"], context["allowPrivilegeEscalation"]) == (False, False)
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"]["drop"] == ["ALL"]
    assert set(context["capabilities"]["add"]) == {
        "BPF",
        "NET_ADMIN",
        "NET_BIND_SERVICE",
        "NET_RAW",
        "SYS_RESOURCE",
    }
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    ports = {container[probe]["httpGet"]["port"] for probe in ("livenessProbe", "readinessProbe")}
    assert ports == {10256}


def test_the_daemonset_s_command_line_and_the_configmap_are_taken(tmp_path):
    (container,) = one("DaemonSet")["spec"]["template"]["spec"]["containers"]
    program, *flags = [word.replace("$(NODE_NAME)", "Node-1") for word in container["command"]]
    data = one("ConfigMap")["data"]
    account = tmp_path / "account"
    account.mkdir()
    for name in ("ca.crt", "token"):
        (account / name).write_text("x")
    for name, text in data.items():
        mounted = text.replace("/var/run/secrets/kubernetes.io/serviceaccount", str(account))
        (tmp_path / name).write_text(mounted)
    mount = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "config")
    flags = [flag.replace(mount, str(tmp_path)) for flag in flags]
    out, err = io.StringIO(), io.StringIO()
    written = tmp_path / "written.yaml"
    code = main(
        [*flags, "--write-config-to", str(written)], Env(stdout=out, stderr=err), program=Path(program).name
    )
    assert (code, err.getvalue()) == (0, f"wrote the configuration to {written}\n")
    config = yaml.safe_load(written.read_text())
    assert config["hostnameOverride"] == "node-1"
    assert config["mode"] == "userspace"
    assert config["clientConnection"]["kubeconfig"] == f"{mount}/kubeconfig.conf"
    access = load_access(str(tmp_path / "kubeconfig.conf"), "")
    assert access.token_file == str(account / "token")
    assert access.server.startswith("https://")


def test_the_image_is_built_of_what_is_there_and_has_both_programs():
    text = (FOLDER / "Containerfile").read_text()
    lines = re.sub(r"\\\n", " ", text).splitlines()
    stages = [line.split() for line in lines if line.startswith("FROM ")]
    assert len(stages) == 2
    assert all(stage[1].endswith("-slim") for stage in stages)
    for line in lines:
        if line.startswith("COPY ") and "--from=" not in line:
            *sources, _ = line.split()[1:]
            assert all((REPOSITORY / source).exists() for source in sources), line
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["kube-proxy"] == scripts["proxyd"]
    (links,) = [line for line in lines if "ln -s" in line]
    assert {Path(word).name for word in links.split() if word.startswith("/opt/")} == set(scripts)
    (program, *_) = one("DaemonSet")["spec"]["template"]["spec"]["containers"][0]["command"]
    assert program == "/usr/local/bin/kube-proxy"


@pytest.mark.parametrize("flag", [f.name for f in (*FLAGS, *ALIASES, *FOREIGN) if getattr(f, "kube", True)])
def test_the_guide_says_what_becomes_of_every_flag(flag):
    table = GUIDE.read_text().partition("## Flags")[2]
    dashes = "-" if len(flag) == 1 else "--"
    shortened = [prefix for prefix in ("log-json-", "log-text-") if flag.startswith(prefix)]
    named = f"--{shortened[0]}..." if shortened else f"{dashes}{flag}"
    assert re.search(rf"(?<![-\w]){re.escape(named)}(?![-\w])", table)
