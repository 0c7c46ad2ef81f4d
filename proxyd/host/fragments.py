"""An nftables table that has the kernel join fragments of datagrams to steered UDP ports before routing.

Only the first fragment of a datagram carries its port, so a policy rule would take that one alone, and the
others would go to the foreign host. The kernel's reassembly in front of routing (nf_defrag_ipv4,
nf_defrag_ipv6) is switched on by whoever needs it, for a network namespace: connection tracking, or the
`tproxy` expression. The table has the latter in a chain that nothing leads to, so that no packet pays for it
and no connection is tracked. What the node forwards is cut into fragments of the former size again.
Reassembly ends with the table.
"""

from __future__ import annotations

from proxyd.host.nft import refused, run, table_exists, which

TABLE = "proxyd-fragments"

# Families (2, 10) and UDP (17) by number, as a node without /etc/protocols cannot tell the names.
_RULES = f"""
table inet {TABLE} {{
  chain never {{
    meta nfproto 2 meta l4proto 17 tproxy ip to :1
    meta nfproto 10 meta l4proto 17 tproxy ip6 to :1
  }}
}}
"""


class Fragments:
    """The table of this node, while a UDP port is steered. Needs `nft`, CAP_NET_ADMIN and tproxy."""

    def sync(self, *, wanted: bool) -> str | None:
        """Have datagrams put together before routing, or no longer.

        Returns:
            None, or one line: why it could not be done.
        """
        try:
            exists = table_exists(TABLE)
        except OSError as error:
            return refused(error) if wanted else None
        if exists == wanted:
            return None
        if which("nft") is None:
            return "the program `nft` was not found; install nftables"
        return run(_RULES if wanted else f"delete table inet {TABLE}\n")
