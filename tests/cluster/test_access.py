"""Kubeconfigs and credentials: all kinds of them, and what is said of wrong ones."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxyd.sources.cluster import KubeconfigError, load_access
from tests.support.api_server import ApiServer
from tests.support.cluster_source import follow, make_ca, make_certificate, service
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    make_ca(folder)
    make_ca(folder, "stranger")
    make_certificate(folder, "server")
    make_certificate(folder, "named", names="DNS:kubernetes.default.svc")
    for name in ("alice", "bob"):
        make_certificate(folder, name)
    return folder


@asynccontextmanager
async def tls_server(pki: Path, name: str = "server") -> AsyncIterator[ApiServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / f"{name}.crt", pki / f"{name}.key")
    context.load_verify_locations(pki / "ca.crt")
    context.verify_mode = ssl.CERT_OPTIONAL
    async with ApiServer(tls=context) as server:
        server.store.create("nodes", {"metadata": {"name": "node"}})
        server.store.create("services", service("web"))
        yield server


def data(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


async def test_tls_with_a_ca(pki: Path, tmp_path: Path) -> None:
    async with tls_server(pki) as server:
        for cluster in (
            {"certificate-authority": str(pki / "ca.crt")},
            {"certificate-authority-data": data(pki / "ca.crt")},
            {"insecure-skip-tls-verify": True},
        ):
            async with follow(server, tmp_path, cluster=cluster) as seen:
                assert seen.services() == {"default/web"}


@pytest.mark.parametrize("cluster", [{}, {"certificate-authority": "stranger.crt"}])
async def test_a_server_that_is_not_trusted(pki: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    for name, value in cluster.items():
        cluster = {name: str(pki / value)}
    async with tls_server(pki) as server, follow(server, tmp_path, cluster=cluster, sync=False) as seen:
        await eventually(lambda: seen.problems)
        assert "the server's certificate is not trusted" in str(seen.problems[0])
        assert server.requests == []
        assert len(seen.problems) == 1


async def test_tls_server_name(pki: Path, tmp_path: Path) -> None:
    cluster = {"certificate-authority": str(pki / "ca.crt")}
    async with tls_server(pki, "named") as server:
        async with follow(server, tmp_path, cluster=cluster, sync=False) as seen:
            await eventually(lambda: seen.said("not trusted"))
        cluster["tls-server-name"] = "kubernetes.default.svc"
        async with follow(server, tmp_path, cluster=cluster) as seen:
            assert seen.services() == {"default/web"}


async def test_client_certificates(pki: Path, tmp_path: Path) -> None:
    cluster = {"certificate-authority": str(pki / "ca.crt")}
    for file in ("crt", "key"):
        (tmp_path / f"me.{file}").write_bytes((pki / f"alice.{file}").read_bytes())
    async with tls_server(pki) as server:
        server.certificates = {"alice", "bob"}
        embedded = {
            "client-certificate-data": data(pki / "bob.crt"),
            "client-key-data": data(pki / "bob.key"),
        }
        async with follow(server, tmp_path, cluster=cluster, user=embedded):
            assert set(server.users) == {"bob"}
        files = {"client-certificate": "me.crt", "client-key": "me.key"}  # relative to the kubeconfig
        async with follow(server, tmp_path, cluster=cluster, user=files) as seen:
            await eventually(lambda: len(server.watches) == 3)
            assert server.users[-1] == "alice"
            # Replaced on disk: new connections show the new one.
            server.users.clear()
            for file in ("crt", "key"):
                (tmp_path / f"new.{file}").write_bytes((pki / f"bob.{file}").read_bytes())
                (tmp_path / f"new.{file}").replace(tmp_path / f"me.{file}")
            server.order("cut")
            await eventually(lambda: server.users.count("bob") >= 3)
            assert seen.problems == []


async def test_a_certificate_that_cannot_be_used_any_more_is_kept(pki: Path, tmp_path: Path) -> None:
    cluster = {"certificate-authority": str(pki / "ca.crt")}
    for file in ("crt", "key"):
        (tmp_path / f"me.{file}").write_bytes((pki / f"alice.{file}").read_bytes())
    async with tls_server(pki) as server:
        server.certificates = {"alice"}
        user = {"client-certificate": "me.crt", "client-key": "me.key"}
        async with follow(server, tmp_path, cluster=cluster, user=user) as seen:
            await eventually(lambda: len(server.watches) == 3)
            (tmp_path / "me.key").write_text("half a k")
            server.order("cut")
            server.store.create("services", service("new"))
            await eventually(lambda: "default/new" in seen.services())
            assert seen.problems == []


async def test_a_token_file_that_rotates(server: ApiServer, tmp_path: Path) -> None:
    server.tokens = {"one": "me"}
    (tmp_path / "token").write_text("one\n")
    async with follow(server, tmp_path, user={"tokenFile": "token"}) as seen:
        for i, token in enumerate(("two", "three", "four")):
            await eventually(lambda: len(server.watches) == 3)
            await seen.settled()
            server.tokens = {token: f"me-{token}"}
            (tmp_path / "new").write_text(token)
            (tmp_path / "new").replace(tmp_path / "token")
            server.order("cut")
            server.store.create("services", service(f"s{i}"))
            await eventually(lambda: f"default/s{i}" in seen.services())  # noqa: B023  it is waited for here
            await eventually(lambda: server.users[-3:] == [f"me-{token}"] * 3)  # noqa: B023  as above
        await seen.settled()
        (tmp_path / "token").write_text("")  # being written: the last one is used
        server.order("cut")
        server.store.create("services", service("last"))
        await eventually(lambda: "default/last" in seen.services())
        assert seen.problems == []


async def test_a_token_that_is_refused_is_told_of_and_read_again(server: ApiServer, tmp_path: Path) -> None:
    server.tokens = {"good": "me"}
    async with follow(server, tmp_path, user={"token": "old"}, sync=False) as seen:
        await eventually(lambda: seen.problems)
        assert "401 Unauthorized: check the credentials in the kubeconfig" in str(seen.problems[0])
        path = tmp_path / "kubeconfig"
        path.write_text(path.read_text().replace("old", "good"))
        await seen.sync()
        await eventually(lambda: len(seen.solved) == 1)


PLUGIN = """#!/bin/sh
echo run >> "$0.runs"
echo "$KUBERNETES_EXEC_INFO" > "$0.info"
echo "$FOO $1" > "$0.given"
cat "$0.answer"
"""


def replace_script(path: Path, text: str) -> None:
    """At once: it may be running."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o700)
    new.replace(path)


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes a credential plugin that prints a status, and returns the user that has it."""
    path = tmp_path / "plugin"

    def write(*, version: str = "v1", command: str = "./plugin", **status: str) -> dict[str, Any]:
        replace_script(path, PLUGIN)
        api = f"client.authentication.k8s.io/{version}"
        answer = {"kind": "ExecCredential", "apiVersion": api, "status": status}
        (tmp_path / "answer.new").write_text(json.dumps(answer))
        (tmp_path / "answer.new").replace(tmp_path / "plugin.answer")
        given = {
            "apiVersion": api,
            "command": command,
            "args": ["login"],
            "env": [{"name": "FOO", "value": "bar"}],
            "provideClusterInfo": True,
            "interactiveMode": "Never",
            "installHint": "get it at example.com",
        }
        return {"exec": given}

    return write


def runs(folder: Path) -> int:
    return len((folder / "plugin.runs").read_text().splitlines())


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
async def test_a_plugin_that_gives_tokens(
    server: ApiServer, tmp_path: Path, plugin: Callable[..., dict[str, Any]], version: str
) -> None:
    server.tokens = {"one": "me"}
    user = plugin(version=version, token="one")
    async with follow(server, tmp_path, user=user) as seen:
        assert runs(tmp_path) == 1, "it is asked once for all requests"
        assert (tmp_path / "plugin.given").read_text() == "bar login\n"
        info = json.loads((tmp_path / "plugin.info").read_text())
        assert info["spec"]["cluster"]["server"] == server.url
        await eventually(lambda: len(server.watches) == 3)
        # After a 401 it is asked again, and nobody needs to hear of it.
        server.tokens = {"two": "me"}
        plugin(version=version, token="two")
        server.order("cut")
        server.store.create("services", service("new"))
        await eventually(lambda: "default/new" in seen.services())
        assert seen.problems == []


async def test_a_plugin_whose_tokens_expire(
    server: ApiServer, tmp_path: Path, plugin: Callable[..., dict[str, Any]]
) -> None:
    server.tokens = {"one": "me"}
    user = plugin(token="one", expirationTimestamp="2020-01-01T00:00:00Z")
    async with follow(server, tmp_path, user=user):
        # Each request asks again: three lists and three watches.
        await eventually(lambda: runs(tmp_path) >= 6)


async def test_a_plugin_that_gives_certificates(
    pki: Path, tmp_path: Path, plugin: Callable[..., dict[str, Any]]
) -> None:
    cluster = {"certificate-authority": str(pki / "ca.crt")}
    async with tls_server(pki) as server:
        server.certificates = {"alice"}
        given = {
            name: (pki / f"alice.{file}").read_text()
            for name, file in (("clientCertificateData", "crt"), ("clientKeyData", "key"))
        }
        async with follow(server, tmp_path, cluster=cluster, user=plugin(**given)) as seen:
            assert seen.services() == {"default/web"}
            assert set(server.users) == {"alice"}


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("#!/bin/sh\necho no luck >&2; exit 3\n", "exit code 3: no luck"),
        ("#!/bin/sh\necho hello\n", "printed no ExecCredential"),
        ("#!/bin/sh\necho '{}'\n", "expected an ExecCredential of client.authentication.k8s.io/v1"),
        ("#!/nowhere/sh\n", "no such file or directory: get it at example.com"),
    ],
)
async def test_plugins_that_fail(
    server: ApiServer, tmp_path: Path, plugin: Callable[..., dict[str, Any]], script: str, text: str
) -> None:
    user = plugin(token="one")
    replace_script(tmp_path / "plugin", script)
    async with follow(server, tmp_path, user=user, sync=False) as seen:
        await eventually(lambda: seen.problems)
        assert text in str(seen.problems[0])
        assert server.requests == []
        plugin(token="one")
        await seen.sync()
        assert len(seen.problems) == 1


async def test_basic_authentication_and_impersonation(server: ApiServer, tmp_path: Path) -> None:
    server.tokens = {"Basic " + base64.b64encode(b"me:secret").decode(): "me"}
    user = {"username": "me", "password": "secret", "as": "system:kube-proxy", "as-groups": ["a", "b"]}
    async with follow(server, tmp_path, user=user):
        assert set(server.users) == {"me"}
    headers = dict(load_access(str(tmp_path / "kubeconfig")).impersonate)
    assert headers == {"Impersonate-User": "system:kube-proxy", "Impersonate-Group": "b"}


async def test_proxies(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = server.url
    server.store.create("services", service("web"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ApiServer, "url", "http://api.invalid:8080")  # nobody reaches it but the proxy
        async with follow(server, tmp_path, cluster={"proxy-url": proxy}) as seen:
            assert seen.services() == {"default/web"}
        monkeypatch.setenv("HTTP_PROXY", proxy)
        async with follow(server, tmp_path) as seen:
            assert seen.services() == {"default/web"}
        monkeypatch.setenv("NO_PROXY", ".invalid")
        async with follow(server, tmp_path, sync=False) as seen:
            await eventually(lambda: seen.said("the name cannot be resolved"))


async def test_in_a_pod(pki: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("pod-token")
    (tmp_path / "ca.crt").write_bytes((pki / "ca.crt").read_bytes())
    environ = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    access = load_access("", environ=environ, service_account=str(tmp_path))
    assert (access.server, access.token_file) == ("https://10.96.0.1:443", str(tmp_path / "token"))
    assert access.ca_file == str(tmp_path / "ca.crt")
    environ["KUBERNETES_SERVICE_HOST"] = "fd00::1"
    assert load_access("", environ=environ, service_account=str(tmp_path)).server == "https://[fd00::1]:443"
    with pytest.raises(KubeconfigError, match="this is not a Pod"):
        load_access("", environ={})
    with pytest.raises(KubeconfigError, match="no such file or directory"):
        load_access("", environ=environ, service_account=str(tmp_path / "nowhere"))


def test_master_stands_in_for_the_server(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(GOOD)
    assert load_access(str(path)).server == "https://10.0.0.1:6443"
    access = load_access(str(path), "https://10.0.0.9:6443/")
    assert (access.server, access.token) == ("https://10.0.0.9:6443", "t")
    assert load_access("", "10.0.0.9:8080").server == "http://10.0.0.9:8080"


GOOD = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://10.0.0.1:6443"}}]
users: [{name: u, user: {token: t}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
preferences: {}
"""


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("current-context: x", "", "current-context: required: name one of the contexts (x)"),
        ("current-context: x", "current-context: y", 'current-context: there is no "y" among `contexts`'),
        ("cluster: c,", "cluster: d,", 'contexts[x].cluster: there is no "d" among `clusters`'),
        ("user: u}", "user: v}", 'contexts[x].user: there is no "v" among `users`'),
        (
            '"https://10.0.0.1:6443"',
            '"ftp://a"',
            "clusters[c].server: expected a URL such as https://10.0.0.1:6443",
        ),
        ('"https://10.0.0.1:6443"', '""', "clusters[c].server: expected a URL"),
        ("kind: Config", "kind: Service", "kind: expected Config"),
        ("{token: t}", "{token: 5}", "users[0].user.token: expected a string, got 5"),
        (
            "{token: t}",
            "{client-certificate-data: '!'}",
            "users[u]: data of a certificate or key is not base64",
        ),
        (
            "{token: t}",
            "{client-certificate-data: YWJj}",
            "users[u]: data of a certificate or key is not PEM",
        ),
        (
            "{token: t}",
            "{client-certificate: a}",
            "users[u]: a client certificate and its key are needed together",
        ),
        (
            "{token: t}",
            "{auth-provider: {name: gcp}}",
            "users[u].auth-provider: Kubernetes 1.26 removed these",
        ),
        (
            "{token: t}",
            "{exec: {command: a}}",
            "users[u].exec.apiVersion: expected client.authentication.k8s.io/v1",
        ),
        (
            "{token: t}",
            "{exec: {command: a, apiVersion: client.authentication.k8s.io/v1, interactiveMode: Always}}",
            "users[u].exec.interactiveMode: Always cannot work in a daemon",
        ),
        ("{token: t}", "{tokenFile: nowhere}", "nowhere: no such file or directory"),
        (
            '6443"}',
            '6443", insecure-skip-tls-verify: true, certificate-authority: a}',
            "clusters[c]: insecure-skip-tls-verify contradicts certificate-authority",
        ),
        ('6443"}', '6443", proxy-url: "socks5://a"}', "clusters[c].proxy-url: expected http://host:port"),
        ("apiVersion: v1", "\tapiVersion: v1", "config:2:1: "),
        ("apiVersion: v1", "- v1", "config:"),
    ],
)
def test_kubeconfigs_that_are_wrong(tmp_path: Path, old: str, new: str, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(KubeconfigError) as error:
        load_access(str(path))
    assert text in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_kubeconfigs_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(KubeconfigError, match="no such file or directory: it is the kubeconfig"):
        load_access(str(tmp_path / "nowhere"))
    path = tmp_path / "config"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KubeconfigError, match="it is not text"):
        load_access(str(path))
    path.write_text("")
    with pytest.raises(KubeconfigError, match="current-context: required"):
        load_access(str(path))


async def test_keys_never_reach_a_disk(pki: Path, tmp_path: Path) -> None:
    """Embedded keys go to OpenSSL through memory, which is given back."""
    user = {"client-certificate-data": data(pki / "bob.crt"), "client-key-data": data(pki / "bob.key")}
    async with tls_server(pki) as server:
        server.certificates = {"bob"}
        cluster = {"certificate-authority": str(pki / "ca.crt")}
        async with follow(server, tmp_path, cluster=cluster, user=user):
            assert not [name for name in open_files() if "memfd:credential" in name]
    assert files_in(tmp_path) == ["kubeconfig"]


def open_files() -> list[str]:
    return [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]
