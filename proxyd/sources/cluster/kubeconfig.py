"""Finds the API server and the credentials for it: in a kubeconfig, --master, or this process's Pod."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec

from proxyd.api.findings import Findings, field_path
from proxyd.api.shape import fit
from proxyd.sources.manifests.files import display, reason
from proxyd.sources.text.yaml_reader import Unreadable, read_fully

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_MAX_BYTES = 4 << 20
_EXEC_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")


class KubeconfigError(ValueError):
    """The access to the API server is not usable: why, and what to do about it, in one line."""


class ExecPlugin(msgspec.Struct, frozen=True, kw_only=True):
    """A command that prints credentials (client.authentication.k8s.io, ExecCredential)."""

    command: str
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    api_version: str = _EXEC_VERSIONS[0]
    install_hint: str = ""
    cluster_info: bool = False  # KUBERNETES_EXEC_INFO has to describe the cluster


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """An API server and a user. Of a pair `..._file` and `..._data` at most one is given; paths are absolute.

    Only the paths of files are here: their content is read when it is needed, and again when it has changed.
    """

    server: str  # https://host:port, maybe with a path; no slash at the end
    origin: str = ""  # what this was read from, for messages
    ca_file: str = ""
    ca_data: bytes = b""
    insecure: bool = False
    tls_server_name: str = ""
    proxy_url: str = ""
    certificate_file: str = ""
    certificate_data: bytes = b""
    key_file: str = ""
    key_data: bytes = b""
    token: str = ""
    token_file: str = ""
    username: str = ""
    password: str = ""
    exec: ExecPlugin | None = None
    impersonate: tuple[tuple[str, str], ...] = ()  # headers


class _Cluster(msgspec.Struct, frozen=True, rename="kebab", kw_only=True):
    server: str = ""
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    insecure_skip_tls_verify: bool = False
    tls_server_name: str = ""
    proxy_url: str = ""


class _Variable(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    value: str = ""


class _Exec(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    command: str
    api_version: str = ""
    args: tuple[str, ...] = ()
    env: tuple[_Variable, ...] = ()
    install_hint: str = ""
    interactive_mode: str = ""
    provide_cluster_info: bool = False


class _Provider(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""


class _User(msgspec.Struct, frozen=True, rename="kebab", kw_only=True):
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    token: str = ""
    token_file: str = msgspec.field(default="", name="tokenFile")
    impersonate: str = msgspec.field(default="", name="as")
    impersonate_groups: tuple[str, ...] = msgspec.field(default=(), name="as-groups")
    username: str = ""
    password: str = ""
    exec: _Exec | None = None
    auth_provider: _Provider | None = None


class _Context(msgspec.Struct, frozen=True, kw_only=True):
    cluster: str = ""
    user: str = ""


class _NamedCluster(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    cluster: _Cluster = _Cluster()


class _NamedUser(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    user: _User = _User()


class _NamedContext(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    context: _Context = _Context()


class _Kubeconfig(msgspec.Struct, frozen=True, rename="kebab", kw_only=True):
    current_context: str = ""
    clusters: tuple[_NamedCluster, ...] = ()
    users: tuple[_NamedUser, ...] = ()
    contexts: tuple[_NamedContext, ...] = ()


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_N = TypeVar("_N", bound=_Named)


def load_access(
    kubeconfig: str,
    master: str = "",
    *,
    environ: Mapping[str, str] | None = None,
    service_account: str = SERVICE_ACCOUNT,
) -> Access:
    """How to reach the API server, as kube-proxy finds it (client-go, BuildConfigFromFlags).

    Args:
        kubeconfig: a path. Where this and `master` are "", the Pod that this runs in is asked.
        master: a URL that takes the place of the kubeconfig's server.
        environ: the environment; None: that of this process.
        service_account: the folder that holds a Pod's token and CA.

    Raises:
        KubeconfigError: the kubeconfig cannot be read, or lacks what is needed.
    """
    if not kubeconfig and not master:
        return _in_cluster(os.environ if environ is None else environ, service_account)
    if not kubeconfig:
        return Access(server=_server_url(master, "--master", tls=False), origin="--master")
    access = _from_file(kubeconfig, master)
    _check_files(access)
    return access


def _in_cluster(environ: Mapping[str, str], folder: str) -> Access:
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port:
        raise KubeconfigError(
            "this is not a Pod (KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set): "
            "give --kubeconfig or"
            " --master"
        )
    token, authority = f"{folder}/token", f"{folder}/ca.crt"
    host = f"[{host}]" if ":" in host else host
    access = Access(
        server=_server_url(f"https://{host}:{port}", "KUBERNETES_SERVICE_HOST", tls=True),
        origin="the Pod's service account",
        ca_file=authority,
        token_file=token,
    )
    _check_files(access)
    return access


def _from_file(path: str, master: str) -> Access:
    shown = display(path)
    config = _parse(path)
    if not config.current_context:
        names = ", ".join(entry.name for entry in config.contexts[:5]) or "there is none"
        raise KubeconfigError(f"{shown}: current-context: required: name one of the contexts ({names})")
    context = _named(config.contexts, config.current_context, "contexts", "current-context", shown).context
    where = f"contexts[{config.current_context}]"
    cluster = _Cluster()
    if context.cluster or not master:
        cluster = _named(config.clusters, context.cluster, "clusters", f"{where}.cluster", shown).cluster
    user = _User()
    if context.user:
        user = _named(config.users, context.user, "users", f"{where}.user", shown).user
    return _access(shown, Path(path).absolute().parent, context, cluster, user, master=master)


def _parse(path: str) -> _Kubeconfig:
    shown = display(path)
    try:
        with Path(path).open("rb") as file:
            text = file.read(_MAX_BYTES + 1).decode()
    except OSError as error:
        raise KubeconfigError(f"{shown}: {reason(error)}: it is the kubeconfig") from None
    except UnicodeDecodeError:
        raise KubeconfigError(f"{shown}: is not a kubeconfig: it is not text") from None
    if len(text) > _MAX_BYTES:
        raise KubeconfigError(f"{shown}: is not a kubeconfig: it is over {_MAX_BYTES >> 20} MiB")
    try:
        raw = read_fully(text.replace("\r\n", "\n"), 0)
    except Unreadable as error:
        raise KubeconfigError(f"{shown}:{error.line}:{error.column}: {error.message}") from None
    found = Findings()
    config = fit({} if raw is None else raw, _Kubeconfig, found)
    if config is None:
        first = found.found[0]
        raise KubeconfigError(": ".join(filter(None, (shown, field_path(first.path), first.message))))
    if isinstance(raw, dict) and raw.get("kind", "Config") != "Config":
        raise KubeconfigError(f"{shown}: kind: expected Config: this is not a kubeconfig")
    return config


def _named(entries: Sequence[_N], name: str, field: str, refers: str, shown: str) -> _N:
    for entry in entries:
        if entry.name == name:
            return entry
    if not name:
        raise KubeconfigError(f"{shown}: {refers}: required")
    raise KubeconfigError(f'{shown}: {refers}: there is no "{name}" among `{field}`')


def _access(
    shown: str, folder: Path, context: _Context, cluster: _Cluster, user: _User, *, master: str
) -> Access:
    here = f"{shown}: clusters[{context.cluster}]"
    authority = _pair(folder, cluster.certificate_authority, cluster.certificate_authority_data, here)
    if cluster.insecure_skip_tls_verify and any(authority):
        raise KubeconfigError(
            f"{here}: insecure-skip-tls-verify contradicts certificate-authority: remove one of them"
        )
    if cluster.proxy_url and urlsplit(cluster.proxy_url).scheme not in ("http", "https"):
        raise KubeconfigError(f"{here}.proxy-url: expected http://host:port")
    mine = f"{shown}: users[{context.user}]"
    certificate = _pair(folder, user.client_certificate, user.client_certificate_data, mine)
    key = _pair(folder, user.client_key, user.client_key_data, mine)
    if any(certificate) != any(key):
        raise KubeconfigError(f"{mine}: a client certificate and its key are needed together")
    if user.auth_provider is not None:
        raise KubeconfigError(
            f"{mine}.auth-provider: Kubernetes 1.26 removed these: use exec with the provider's plugin"
        )
    tls = cluster.insecure_skip_tls_verify or any(authority) or any(certificate)
    field = "--master" if master else f"{here}.server"
    return Access(
        server=_server_url(master or cluster.server, field, tls=tls),
        origin=shown,
        ca_file=authority[0],
        ca_data=authority[1],
        insecure=cluster.insecure_skip_tls_verify,
        tls_server_name=cluster.tls_server_name,
        proxy_url=cluster.proxy_url,
        certificate_file=certificate[0],
        certificate_data=certificate[1],
        key_file=key[0],
        key_data=key[1],
        token=user.token,
        token_file=_absolute(folder, user.token_file),
        username=user.username,
        password=user.password,
        exec=_plugin(user.exec, folder, f"{mine}.exec"),
        impersonate=_impersonation(user),
    )


def _impersonation(user: _User) -> tuple[tuple[str, str], ...]:
    if not user.impersonate:
        return ()
    return (
        ("Impersonate-User", user.impersonate),
        *(("Impersonate-Group", group) for group in user.impersonate_groups),
    )


def _plugin(given: _Exec | None, folder: Path, where: str) -> ExecPlugin | None:
    if given is None:
        return None
    if given.api_version not in _EXEC_VERSIONS:
        expected = " or ".join(_EXEC_VERSIONS)
        raise KubeconfigError(f'{where}.apiVersion: expected {expected}, got "{given.api_version}"')
    if given.interactive_mode == "Always":
        raise KubeconfigError(
            f"{where}.interactiveMode: Always cannot work in a daemon: nobody is there to ask"
        )
    if not given.command:
        raise KubeconfigError(f"{where}.command: required")
    # As in client-go a path with a slash is relative to the kubeconfig, and a bare name is looked up in PATH.
    command = str(folder / given.command) if "/" in given.command else given.command
    return ExecPlugin(
        command=command,
        args=given.args,
        env=tuple((variable.name, variable.value) for variable in given.env),
        api_version=given.api_version,
        install_hint=given.install_hint.strip(),
        cluster_info=given.provide_cluster_info,
    )


def _pair(folder: Path, path: str, data: str, where: str) -> tuple[str, bytes]:
    """The path and the data of which at most one is set: data wins."""
    if not data:
        return _absolute(folder, path), b""
    try:
        decoded = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise KubeconfigError(f"{where}: data of a certificate or key is not base64") from None
    if b"-----BEGIN " not in decoded:
        raise KubeconfigError(f"{where}: data of a certificate or key is not PEM in base64")
    return "", decoded


def _absolute(folder: Path, path: str) -> str:
    return str(folder / path) if path else ""


def _server_url(text: str, where: str, *, tls: bool) -> str:
    """The server's URL without a slash at the end. A scheme that is missing is https with TLS, else http."""
    url = text if "://" in text else f"{'https' if tls else 'http'}://{text}"
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not text or not good or parts.query or parts.fragment:
        raise KubeconfigError(f'{where}: expected a URL such as https://10.0.0.1:6443, got "{text}"')
    return url.rstrip("/")


def _check_files(access: Access) -> None:
    """Raises KubeconfigError for a file that cannot be read at start: the configuration is wrong."""
    for path in (access.ca_file, access.certificate_file, access.key_file, access.token_file):
        if not path:
            continue
        try:
            with Path(path).open("rb"):
                pass
        except OSError as error:
            raise KubeconfigError(f"{access.origin}: {display(path)}: {reason(error)}") from None
