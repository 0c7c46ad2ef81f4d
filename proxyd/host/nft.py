"""Changes tables of nftables by scripts for the program `nft`, and asks netlink what there is."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterable

from proxyd.api.service import Protocol
from proxyd.host.netlink import (
    NETLINK_NETFILTER,
    Message,
    Netlink,
    attribute,
    attribute_list,
    attributes,
    note_own,
    unpacked,
)
from proxyd.host.rights import advice
from proxyd.state.spec import ListenerKey

_TIMEOUT = 20.0  # seconds for one run of nft
_SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
# linux/netfilter/nf_tables.h
_NFNL_SUBSYS_NFTABLES = 10
_GETTABLE, _DELTABLE, _GETRULE, _GETSETELEM, _GETGEN = (
    _NFNL_SUBSYS_NFTABLES << 8 | message for message in (1, 2, 7, 13, 16)
)
_NFTA_TABLE_NAME = _NFTA_RULE_TABLE = _NFTA_SET_ELEM_LIST_TABLE = _NFTA_GEN_ID = _NFTA_SET_ELEM_KEY = 1
_NFTA_SET_ELEM_LIST_SET, _NFTA_SET_ELEM_LIST_ELEMENTS = 2, 3
INET, ARP = "inet", "arp"
_FAMILIES = {INET: 1, ARP: 3}  # linux/netfilter.h, NFPROTO_*
_NFPROTO_INET = _FAMILIES[INET]
_NFGENMSG = 4  # bytes: family, version, resource
# Protocols are numbers: a node without /etc/protocols does not know the names.
_NUMBERS = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}
_PROTOCOLS = {number: protocol for protocol, number in _NUMBERS.items()}

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


def table_exists(table: str, family: str = INET) -> bool:
    """Whether a table exists, whichever process made it.

    Raises:
        OSError: netfilter's netlink cannot be used; EPERM without CAP_NET_ADMIN.
    """
    with Netlink(NETLINK_NETFILTER) as netlink:
        name = attribute(_NFTA_TABLE_NAME, table.encode() + b"\0")
        try:
            netlink.get(Message(_GETTABLE, bytes([_FAMILIES[family], 0, 0, 0]) + name))
        except FileNotFoundError:
            return False
    return True


def delete_table(table: str, family: str = INET) -> str | None:
    """Delete a table, also where there is no program `nft`.

    Returns:
        None, or one line that says why it could not be deleted. A table that is not there is no failure.
    """
    message = Message(
        _DELTABLE,
        bytes([_FAMILIES[family], 0, 0, 0]) + attribute(_NFTA_TABLE_NAME, table.encode() + b"\0"),
    )
    try:
        with Netlink(NETLINK_NETFILTER) as netlink:
            failure = netlink.transact(_NFNL_SUBSYS_NFTABLES, message)
    except OSError as error:
        return refused(error)
    if failure is None or failure.errno == errno.ENOENT:
        return None
    return refused(OSError(*failure))


def generation() -> int:
    """A number that every change of this namespace's rules, whoever makes it, counts up.

    Raises:
        OSError: as of `table_exists`.
    """
    with Netlink(NETLINK_NETFILTER) as netlink:
        body = netlink.get(Message(_GETGEN, bytes(_NFGENMSG))).body
    return int.from_bytes(attributes(body, _NFGENMSG)[_NFTA_GEN_ID], "big")


def rules_of(table: str) -> tuple[bytes, ...]:
    """The rules of a table of family inet, with their handles, as the kernel describes them; () of no table.

    Raises:
        OSError: as of `table_exists`.
    """
    body = bytes([_NFPROTO_INET, 0, 0, 0]) + attribute(_NFTA_RULE_TABLE, table.encode() + b"\0")
    with Netlink(NETLINK_NETFILTER) as netlink:
        return tuple(message.body[_NFGENMSG:] for message in netlink.dump(Message(_GETRULE, body)))


def members_of(table: str, name: str) -> list[bytes]:
    """The elements of a set of a table of family inet, as the kernel has them; [] where there is none.

    Raises:
        OSError: as of `table_exists`.
    """
    body = (
        bytes([_NFPROTO_INET, 0, 0, 0])
        + attribute(_NFTA_SET_ELEM_LIST_TABLE, table.encode() + b"\0")
        + attribute(_NFTA_SET_ELEM_LIST_SET, name.encode() + b"\0")
    )
    with Netlink(NETLINK_NETFILTER) as netlink:
        try:
            messages = netlink.dump(Message(_GETSETELEM, body))
        except FileNotFoundError:
            return []
    found = []
    for message in messages:
        elements = attributes(message.body, _NFGENMSG).get(_NFTA_SET_ELEM_LIST_ELEMENTS, b"")
        for _, element in attribute_list(elements):
            (_, value), *_rest = attribute_list(attributes(element, 0)[_NFTA_SET_ELEM_KEY])
            found.append(value)
    return found


def refused(error: OSError) -> str:
    """One line of text for an error of `table_exists`: why, and what to do."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return f"nftables may not be used: {advice('CAP_NET_ADMIN')}"
    return f"nftables cannot be used: {error.strerror or error}"


def port(key: ListenerKey) -> str:
    """A listener key as an element of a set of address, protocol and port."""
    return f"{key.ip} . {_NUMBERS[key.protocol]} . {key.port}"


def port_of(member: bytes) -> ListenerKey:
    """The listener key that an element of such a set, from `members_of`, stands for."""
    *address, protocol, number = (member[start : start + 4] for start in range(0, len(member), 4))
    return ListenerKey(
        unpacked(b"".join(address)), int.from_bytes(number[:2], "big"), _PROTOCOLS[protocol[0]]
    )


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
        else:
            note_own(self._process.pid)  # which is its port id, unless another socket has that already

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
