"""Changes tables of nftables by scripts for the program `nft`, and asks netlink whether a table exists."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterable

from proxyd.host.netlink import NETLINK_NETFILTER, Message, Netlink, attribute
from proxyd.state.spec import ListenerKey

_TIMEOUT = 20.0  # seconds for one run of nft
_SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
# linux/netfilter/nf_tables.h
_GETTABLE = 10 << 8 | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
_NFTA_TABLE_NAME = 1
_NFPROTO_INET = 1
# Protocols are numbers: a node without /etc/protocols does not know the names.
_NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132}

# The answer to a client that may not connect. The rules keep no state of connections: by its packet alone
# they see that a client is new, by a first SYN of TCP (6) or an INIT chunk of SCTP (132).
REJECT_NEW_TCP = """
    tcp flags & (fin | syn | rst | ack) == syn reject with tcp reset
    meta l4proto 6 accept
"""
# After "port unreachable" an SCTP client tries for minutes; "protocol unreachable" ends it at once, but IPv6
# has no such message.
REJECT_OTHER = """
    meta l4proto 132 @th,96,8 != 1 accept
    meta nfproto ipv4 meta l4proto 132 reject with icmp type prot-unreachable
    reject with icmpx type port-unreachable
"""


def which(program: str) -> str | None:
    """The path of a program, in PATH or in the system's own folders; None if it is not installed."""
    return shutil.which(program, path=_SEARCH)


def table_exists(table: str) -> bool:
    """Whether a table of family inet exists, whichever process made it.

    Raises:
        OSError: netfilter's netlink cannot be used; EPERM without CAP_NET_ADMIN.
    """
    with Netlink(NETLINK_NETFILTER) as netlink:
        name = attribute(_NFTA_TABLE_NAME, table.encode() + b"\0")
        try:
            netlink.get(Message(_GETTABLE, bytes([_NFPROTO_INET, 0, 0, 0]) + name))
        except FileNotFoundError:
            return False
    return True


def refused(error: OSError) -> str:
    """One line of text for an error of `table_exists`: why, and what to do."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return "nftables needs root or CAP_NET_ADMIN"
    return f"nftables cannot be used: {error.strerror or error}"


def port(key: ListenerKey) -> str:
    """A listener key as an element of a set of address, protocol and port."""
    return f"{key.ip} . {_NUMBERS[key.protocol]} . {key.port}"


def elements(verb: str, table: str, name: str, members: Iterable[str]) -> list[str]:
    """The commands that add elements to, or delete them from, the sets NAME4 and NAME6."""
    families: dict[int, list[str]] = {4: [], 6: []}
    for element in members:
        families[6 if ":" in element else 4].append(element)
    return [
        f"{verb} element inet {table} {name}{family} {{ {', '.join(found)} }}\n"
        for family, found in families.items()
        if found
    ]


class Run:
    """A run of nft, which begins at once. Either all of the script happens or nothing.

    Args:
        script: the commands.
    """

    def __init__(self, script: str) -> None:
        self._failed = ""
        self._process: subprocess.Popen[bytes] | None = None
        program = which("nft")
        if program is None:
            self._failed = "the program `nft` was not found; install nftables"
            return
        try:
            # nft reads from a file in memory: into a pipe a long script would have to be fed.
            with os.fdopen(os.memfd_create("proxyd-nft"), "w+b") as file:
                file.write(script.encode())
                file.seek(0)
                self._process = subprocess.Popen(  # noqa: S603 - the script holds addresses and numbers only
                    [program, "-f", "-"], stdin=file, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
        except OSError as error:
            self._failed = f"nft did not run: {error}"

    def wait(self) -> str | None:
        """Wait for its end; to be called once. Returns None, or one line that nft printed."""
        process = self._process
        if process is None:
            return self._failed
        try:
            with process:
                try:
                    _, said = process.communicate(timeout=_TIMEOUT)
                except BaseException:
                    process.kill()
                    raise
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"nft did not run: {error}"
        if process.returncode == 0:
            return None
        lines = said.decode("utf-8", "replace").strip().splitlines()
        return lines[0] if lines else f"nft ended with status {process.returncode}"


def run(script: str) -> str | None:
    """Run nft with a script, of which all happens or nothing. Returns None, or one line that nft printed."""
    return Run(script).wait()
