"""An nftables table that refuses new clients of steered addresses, before routing.

A policy rule of type `unreachable` is not enough: over IPv6 and UDP clients take its ICMP error for a
temporary one, and the kernel limits how many it sends. This table answers as a closed port does, and leaves
established connections alone.
"""

from __future__ import annotations

from proxyd.host.nft import REJECT_NEW_TCP, REJECT_OTHER, elements, port, refused, run, table_exists, which
from proxyd.state.spec import ListenerKey

TABLE = "proxyd-refusal"

# It is before connection tracking (-200) and address translation: refused packets make no entries there.
_RULES = f"""
table inet {TABLE} {{
  set ports4 {{ type ipv4_addr . inet_proto . inet_service; }}
  set ports6 {{ type ipv6_addr . inet_proto . inet_service; }}
  chain prerouting {{
    type filter hook prerouting priority raw - 10; policy accept;
    ip daddr . meta l4proto . th dport @ports4 goto refuse
    ip6 daddr . meta l4proto . th dport @ports6 goto refuse
  }}
  chain refuse {{
    {REJECT_NEW_TCP}
    {REJECT_OTHER}
  }}
}}
"""


class Refusal:
    """This node's table, there while something is refused. It needs `nft`, CAP_NET_ADMIN and Linux 5.9."""

    def __init__(self) -> None:
        self._keys: frozenset[ListenerKey] | None = None  # those that are refused now; None: not known

    def sync(self, keys: frozenset[ListenerKey]) -> str | None:
        """Refuse new clients of these keys, and of no others.

        Returns:
            None, or one line that says why it could not be done.
        """
        try:
            exists = table_exists(TABLE)
        except OSError as error:
            return refused(error) if keys else None
        if exists == bool(keys) and (not keys or keys == self._keys):
            self._keys = keys
            return None
        if which("nft") is None:
            return "the program `nft` was not found; install nftables"
        script = f"table inet {TABLE}\ndelete table inet {TABLE}\n"
        if keys:
            script += _RULES + "".join(elements("add", TABLE, "ports", map(port, keys)))
        failed = run(script)
        self._keys = keys if failed is None else None
        return failed
