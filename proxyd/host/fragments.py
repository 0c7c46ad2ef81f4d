"""An nftables table for fragmented datagrams to steered UDP ports: the kernel joins them before routing.

Only the first fragment of a datagram has its port: a policy rule would take that fragment alone, and the
others would go to the foreign host. The kernel can reassemble before routing (nf_defrag_ipv4,
nf_defrag_ipv6): connection tracking switches that on for a network namespace, and so does the `tproxy`
expression. The table has such an expression in a chain that nothing leads to, so no packet pays for it, and
no connection is tracked. What the node forwards is cut into fragments of their former size again. Reassembly
ends with the table.
"""

from __future__ import annotations

from proxyd.host.nft import delete_table, refused, run, table_exists

TABLE = "proxyd-fragments"

# Families (2, 10) and UDP (17) are numbers: a node without /etc/protocols does not know the names.
_RULES = f"""
table inet {TABLE} {{
  chain never {{
    meta nfproto 2 meta l4proto 17 tproxy ip to :1
    meta nfproto 10 meta l4proto 17 tproxy ip6 to :1
  }}
}}
"""


class Fragments:
    """This node's table, there while a UDP port is steered. It needs `nft`, CAP_NET_ADMIN and tproxy.

    Attributes:
        made: whether the table is there, as far as is known.
    """

    def __init__(self) -> None:
        self.made = False
        self._suspect = False

    def forget(self) -> None:
        """Have the next `sync` make the table anew: somebody else has changed it."""
        self._suspect = True

    def sync(self, *, wanted: bool) -> str | None:
        """Begin or end the reassembly of datagrams before routing.

        Returns:
            None, or one line that says why it could not be done.
        """
        try:
            exists = table_exists(TABLE)
        except OSError as error:
            return refused(error) if wanted else None
        if exists == wanted and not (exists and self._suspect):
            self.made = exists
            return None
        if wanted:
            # Deleted first: somebody may have emptied it.
            failed = run(f"table inet {TABLE}\ndelete table inet {TABLE}\n{_RULES}")
        else:
            failed = delete_table(TABLE)
        self._suspect, self.made = False, wanted and failed is None
        return failed
