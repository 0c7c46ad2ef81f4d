"""The credentials of the moment: from files, which may be replaced, and plugins, which are asked again."""

from __future__ import annotations

import asyncio
import base64
import os
import ssl
import time
from pathlib import Path

from proxyd.sources.cluster.execplugin import ExecCredential, run_plugin
from proxyd.sources.cluster.kubeconfig import Access, KubeconfigError, load_access
from proxyd.sources.manifests.files import display, reason

_MAX_TOKEN = 1 << 20
# A plugin's credentials are renewed so many seconds before they expire: none should expire under way.
_RENEW_BEFORE = 10.0

_Stamp = tuple[tuple[int, int, int] | None, ...]


class Credentials:
    """Headers and TLS settings for the next request.

    Token and certificate files are read again when they have changed, as the kubelet replaces them. Where the
    new file cannot be read the last good content stays in use. After a 401, `refused` reads everything anew.

    Args:
        access: where the API server is, and how to log in to it.
        kubeconfig: a path, which is read again after a 401; "" where there is none.
        master: as given to `load_access`.
    """

    def __init__(self, access: Access, *, kubeconfig: str = "", master: str = "") -> None:
        self.access = access
        self._kubeconfig, self._master = kubeconfig, master
        self._token = access.token
        self._context: ssl.SSLContext | None = None
        self._stamp: _Stamp | None = None
        self._exec: ExecCredential | None = None
        self._lock = asyncio.Lock()

    async def headers(self) -> list[tuple[str, str]]:
        """The headers that authenticate a request.

        Raises:
            KubeconfigError: the credential plugin failed.
        """
        headers = list(self.access.impersonate)
        if self.access.username:
            pair = f"{self.access.username}:{self.access.password}".encode()
            headers.append(("Authorization", f"Basic {base64.b64encode(pair).decode()}"))
            return headers
        token = self._read_token()
        if not token and (given := await self._ask_plugin()):
            token = given.token
        if token:
            headers.append(("Authorization", f"Bearer {token}"))
        return headers

    async def tls(self) -> ssl.SSLContext:
        """The TLS context: the same Python object as long as no file behind it has changed.

        Raises:
            KubeconfigError: a certificate or key cannot be used.
        """
        given = await self._ask_plugin() if not self.access.certificate_file else None
        access = self.access
        stamp = _stamp(access.ca_file, access.certificate_file, access.key_file)
        if self._context is not None and stamp == self._stamp:
            return self._context
        try:
            context = _tls_context(access, given)
        except KubeconfigError:
            if self._context is None:
                raise
            return self._context  # the files are being replaced: the next request tries again
        self._context, self._stamp = context, stamp
        return context

    def refused(self) -> None:
        """Take note that the server answered 401."""
        self.reread()

    def reread(self) -> None:
        """Ask the plugin and read the kubeconfig again for the next request; what fails stays as it was."""
        if self._exec is not None:
            self._exec = None
            self._context = None
        if self._kubeconfig:
            try:
                access = load_access(self._kubeconfig, self._master)
            except KubeconfigError:
                return  # the access in use may still be good
            if access != self.access:
                self.access = access
                self._token = access.token
                self._context = None

    def _read_token(self) -> str:
        path = self.access.token_file
        if path:
            try:
                with Path(path).open("rb") as file:
                    token = file.read(_MAX_TOKEN).decode("ascii").strip()
            except (OSError, ValueError):
                token = ""
            # An empty or broken file is being written. The token in use is good for some time.
            if token and token.isprintable():
                self._token = token
        return self._token

    async def _ask_plugin(self) -> ExecCredential | None:
        plugin = self.access.exec
        if plugin is None:
            return None
        async with self._lock:
            if self._exec is None or self._exec.expires_at - _RENEW_BEFORE < time.time():
                before = self._exec
                self._exec = await run_plugin(plugin, self.access)
                if before is None or before.certificate != self._exec.certificate:
                    self._context = None
            return self._exec


def _stamp(*paths: str) -> _Stamp:
    stamps = []
    for path in paths:
        try:
            found = os.stat(path) if path else None  # noqa: PTH116  thrice before each request
        except OSError:
            found = None
        stamps.append((found.st_ino, found.st_mtime_ns, found.st_size) if found else None)
    return tuple(stamps)


def _tls_context(access: Access, given: ExecCredential | None) -> ssl.SSLContext:
    # From Python 3.13 create_default_context is stricter than Go, and refuses the CA of many clusters.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if access.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif access.ca_file or access.ca_data:
        where = display(access.ca_file) if access.ca_file else f"{access.origin}: certificate-authority-data"
        try:
            data = access.ca_data or Path(access.ca_file).read_bytes()
            context.load_verify_locations(cadata=data.decode("utf-8", "replace"))
        except (OSError, ValueError) as error:
            raise KubeconfigError(f"{where}: no CA certificates: {_why(error)}") from None
    else:
        context.load_default_certs()
    certificate, key = access.certificate_data, access.key_data
    if given is not None and given.certificate:
        certificate, key = given.certificate, given.key
    if certificate or key or access.certificate_file:
        _load_certificate(context, access, certificate, key)
    return context


def _load_certificate(context: ssl.SSLContext, access: Access, certificate: bytes, key: bytes) -> None:
    """Loads them through files in memory: OpenSSL reads files only, and no key should come onto a disk."""
    descriptors: list[int] = []

    def path_of(data: bytes, path: str) -> str:
        if not data:
            return path
        descriptor = os.memfd_create("credential", os.MFD_CLOEXEC)
        descriptors.append(descriptor)
        os.write(descriptor, data)
        return f"/proc/self/fd/{descriptor}"

    try:
        context.load_cert_chain(
            path_of(certificate, access.certificate_file),
            path_of(key, access.key_file),
            password=lambda: b"",  # or OpenSSL would ask at the terminal
        )
    except (OSError, ValueError) as error:
        where = display(access.certificate_file) if access.certificate_file else access.origin
        raise KubeconfigError(f"{where}: client certificate and key cannot be used: {_why(error)}") from None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return reason(error)
