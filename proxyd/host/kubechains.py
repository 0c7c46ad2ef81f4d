"""Removes the chains of kube-proxy's userspace mode, which kube-proxy itself cannot since Kubernetes 1.26."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from proxyd.host.cleanup import Removal
from proxyd.host.nft import which

# kubernetes 1.25, pkg/proxy/userspace/proxier.go. KUBE-NODEPORTS is a chain of the iptables mode.
PREFIXES = ("KUBE-PORTALS-", "KUBE-NODEPORT-")
_TABLES = ("nat", "filter")
_TIMEOUT = 20.0
_JUMP = re.compile(r"\s-[jg] (\S+)")


class _Tool(NamedTuple):
    """One variant of iptables, such as `iptables-nft` or `ip6tables-legacy`."""

    name: str
    # The file of /proc/net that lists its tables: touching another would load it. "": any may be touched.
    loaded: str


def remove_userspace_chains(*, dry_run: bool = False) -> Removal:
    """Remove the chains KUBE-PORTALS-* and KUBE-NODEPORT-* and the rules that lead to them, and nothing else.

    Args:
        dry_run: only tell what would be removed.

    Returns:
        A text for each table that had such chains: "iptables-nft table nat: KUBE-PORTALS-HOST".
    """
    gone: list[str] = []
    failed: list[str] = []
    for tool in _tools():
        for table in _TABLES:
            if tool.loaded and table not in loaded_tables(tool.loaded):
                continue
            saved = _run(f"{tool.name}-save", "-t", table)
            script, chains = removal(table, saved.stdout) if saved and not saved.returncode else ("", [])
            if not chains:
                continue
            what = f"{tool.name} table {table}: {', '.join(chains)}"
            if dry_run:
                gone.append(what)
                continue
            done = _run(f"{tool.name}-restore", "--noflush", stdin=script)
            if done is not None and done.returncode == 0:
                gone.append(what)
            else:
                why = done.stderr.strip().splitlines() if done else []
                failed.append(
                    f"cannot remove {what}: {why[0] if why else f'{tool.name}-restore did not run'}"
                )
    return Removal(tuple(gone), tuple(failed))


def removal(table: str, saved: str) -> tuple[str, list[str]]:
    """Makes the script by which `iptables-restore --noflush` removes the chains.

    Args:
        table: the name of the iptables table.
        saved: what `iptables-save -t TABLE` printed.

    Returns:
        The script, and the names of the chains; "" and [] if there are none.
    """
    chains = sorted(
        line[1:].split()[0]
        for line in saved.splitlines()
        if line.startswith(":") and line[1:].startswith(PREFIXES)
    )
    if not chains:
        return "", []
    commands = [f"*{table}"]
    for line in saved.splitlines():
        if not line.startswith("-A ") or line.startswith(tuple(f"-A {chain} " for chain in chains)):
            continue
        jump = _JUMP.search(line)
        if jump and jump[1] in chains:
            commands.append(f"-D {line[3:]}")
    commands += [f"-F {chain}" for chain in chains]
    commands += [f"-X {chain}" for chain in chains]
    return "\n".join([*commands, "COMMIT", ""]), chains


def _tools() -> Iterator[_Tool]:
    for program, names in (("iptables", "ip_tables_names"), ("ip6tables", "ip6_tables_names")):
        if which(f"{program}-nft-save"):
            yield _Tool(f"{program}-nft", "")
        if which(f"{program}-legacy-save"):
            yield _Tool(f"{program}-legacy", names)
        elif not which(f"{program}-nft-save") and which(f"{program}-save"):
            yield _Tool(program, names)


def loaded_tables(names: str) -> list[str]:
    """The loaded tables of iptables-legacy, as the file `names` of /proc/net lists them."""
    try:
        return Path("/proc/thread-self/net", names).read_text(encoding="ascii").split()
    except OSError:
        return []


def _run(program: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str] | None:
    path = which(program)
    if path is None:
        return None
    try:
        return subprocess.run(  # noqa: S603 - the program's own path; the script is its own output
            [path, *arguments],
            input=stdin,
            capture_output=True,
            timeout=_TIMEOUT,
            check=False,
            text=True,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
