"""Replies of parked UDP listeners: an nft table gives them the Service's port in place of the parking port.

The chain runs before connection tracking, to which such a reply would be a stranger's. It looks only at
packets from privileged ports. Needs `nft` and CAP_NET_ADMIN.
"""

from __future__ import annotations

from collections.abc import Mapping

from proxyd.host.nft import delete_table, refused, run, table_exists, which
from proxyd.state.spec import ListenerKey

TABLE = "proxyd-udp"

_RULES = f"""
table inet {TABLE} {{
  map ports4 {{ type ipv4_addr . inet_service : inet_service; }}
  map ports6 {{ type ipv6_addr . inet_service : inet_service; }}
  chain output {{
    type filter hook output priority -310; policy accept;
    meta l4proto != 17 accept
    udp sport >= 1024 accept
    udp sport set ip saddr . udp sport map @ports4 accept
    udp sport set ip6 saddr . udp sport map @ports6 accept
  }}
}}
"""


class UdpSourcePorts:
    """The table of this node, there while a UDP listener is parked."""

    def __init__(self) -> None:
        self._known: dict[ListenerKey, int] | None = None  # what was last put in force; None: not known

    @staticmethod
    def unavailable() -> str:
        """Why it can't be used, in one line; "" where it can."""
        if which("nft") is None:
            return "the program `nft` was not found; install nftables"
        try:
            table_exists(TABLE)
        except OSError as error:
            return refused(error)
        return ""

    @property
    def made(self) -> bool:
        """Whether the table is there, as far as is known."""
        return bool(self._known)

    def forget(self) -> None:
        """Have the next `sync` make the table anew: somebody else has changed it."""
        self._known = None

    def sync(self, parked: Mapping[ListenerKey, int]) -> str:
        """Put these in force, and no others.

        Args:
            parked: by listener, the port that its socket is bound to.

        Returns:
            "", or one line: what went wrong.
        """
        if self._known == parked:
            return ""
        try:
            exists = table_exists(TABLE)
        except OSError as error:
            return refused(error)
        known = self._known if exists else None
        if not parked:
            failed = delete_table(TABLE) if exists else None
        elif known is not None:
            gone = {key: port for key, port in known.items() if parked.get(key) != port}
            new = {key: port for key, port in parked.items() if known.get(key) != port}
            failed = run(_elements("delete", gone) + _elements("add", new))
        else:
            failed = "not known"
        if failed and parked:
            failed = run(
                f"table inet {TABLE}\ndelete table inet {TABLE}\n" + _RULES + _elements("add", parked)
            )
        self._known = None if failed else dict(parked)
        return failed or ""

    def remove(self) -> str:
        """Delete the table. Returns "", or what went wrong."""
        return self.sync({})


def _elements(verb: str, parked: Mapping[ListenerKey, int]) -> str:
    found: dict[int, list[str]] = {4: [], 6: []}
    for key, port in parked.items():
        value = f" : {key.port}" if verb == "add" else ""
        found[6 if ":" in key.ip else 4].append(f"{key.ip} . {port}{value}")
    return "".join(
        f"{verb} element inet {TABLE} ports{family} {{ {', '.join(elements)} }}\n"
        for family, elements in found.items()
        if elements
    )
