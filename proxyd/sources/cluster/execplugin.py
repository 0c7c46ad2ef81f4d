"""Runs a command that prints credentials (client.authentication.k8s.io, ExecCredential)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from datetime import UTC, datetime

import msgspec

from proxyd.api.findings import clip
from proxyd.sources.cluster.kubeconfig import Access, ExecPlugin, KubeconfigError

_SECONDS = 60.0
_MAX_OUTPUT = 1 << 20
_SHOWN = 200


class ExecCredential(msgspec.Struct, frozen=True, kw_only=True):
    """What a plugin gave: a token, or a certificate and its key in PEM, or all of them."""

    token: str = ""
    certificate: bytes = b""
    key: bytes = b""
    expires_at: float = float("inf")  # Unix time


class _Status(msgspec.Struct, rename="camel", kw_only=True):
    token: str | None = None
    client_certificate_data: str | None = None
    client_key_data: str | None = None
    expiration_timestamp: datetime | None = None


class _Credential(msgspec.Struct, rename="camel", kw_only=True):
    kind: str = ""
    api_version: str = ""
    status: _Status | None = None


async def run_plugin(plugin: ExecPlugin, access: Access) -> ExecCredential:
    """Runs the command and returns what it printed. It is killed after a minute, and when this is cancelled.

    Raises:
        KubeconfigError: the command cannot be run, failed, or printed something else.
    """
    name = f"credential plugin {plugin.command}"
    try:
        process = await asyncio.create_subprocess_exec(
            plugin.command,
            *plugin.args,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **dict(plugin.env), "KUBERNETES_EXEC_INFO": _info(plugin, access)},
        )
    except OSError as error:
        why = os.strerror(error.errno).lower() if error.errno else str(error)
        hint = f": {clip(plugin.install_hint, _SHOWN)}" if plugin.install_hint else ""
        raise KubeconfigError(f"{name}: {why}{hint}") from None
    try:
        async with asyncio.timeout(_SECONDS):
            assert process.stdout is not None
            assert process.stderr is not None
            # Both are read at once: a plugin that writes much to one of them would wait for ever else.
            output, errors = await asyncio.gather(_read(process.stdout), _read(process.stderr))
            code = await process.wait()
    except TimeoutError:
        raise KubeconfigError(f"{name}: no answer in {_SECONDS:.0f} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if code:
        said = clip(errors.decode(errors="replace").strip(), _SHOWN)
        raise KubeconfigError(f"{name}: exit code {code}{': ' if said else ''}{said}")
    return _credential(name, plugin, output)


async def _read(stream: asyncio.StreamReader) -> bytes:
    """Reads a stream to its end, and returns the first megabyte."""
    parts: list[bytes] = []
    size = 0
    while part := await stream.read(65536):
        if size < _MAX_OUTPUT:
            parts.append(part)
            size += len(part)
    return b"".join(parts)


def _credential(name: str, plugin: ExecPlugin, output: bytes) -> ExecCredential:
    try:
        printed = msgspec.json.decode(output, type=_Credential)
    except (msgspec.DecodeError, ValueError) as error:
        raise KubeconfigError(f"{name}: printed no ExecCredential: {clip(str(error), _SHOWN)}") from None
    status = printed.status
    if printed.kind != "ExecCredential" or printed.api_version != plugin.api_version or status is None:
        raise KubeconfigError(f"{name}: expected an ExecCredential of {plugin.api_version} with a status")
    certificate, key = status.client_certificate_data or "", status.client_key_data or ""
    if bool(certificate) != bool(key):
        raise KubeconfigError(f"{name}: clientCertificateData and clientKeyData are needed together")
    if not status.token and not certificate:
        raise KubeconfigError(f"{name}: gave neither a token nor a client certificate")
    expires = status.expiration_timestamp
    if expires is not None and expires.tzinfo is None:
        expires = expires.replace(tzinfo=UTC)
    return ExecCredential(
        token=status.token or "",
        certificate=certificate.encode(),
        key=key.encode(),
        expires_at=expires.timestamp() if expires else float("inf"),
    )


def _info(plugin: ExecPlugin, access: Access) -> str:
    """The value of KUBERNETES_EXEC_INFO."""
    spec: dict[str, object] = {"interactive": False}
    if plugin.cluster_info:
        authority = access.ca_data
        if access.ca_file:
            with contextlib.suppress(OSError), open(access.ca_file, "rb") as file:  # noqa: PTH123
                authority = file.read()
        spec["cluster"] = {
            "server": access.server,
            "tls-server-name": access.tls_server_name,
            "insecure-skip-tls-verify": access.insecure,
            "certificate-authority-data": base64.b64encode(authority).decode(),
        }
    info = {"apiVersion": plugin.api_version, "kind": "ExecCredential", "spec": spec}
    return msgspec.json.encode(info).decode()
