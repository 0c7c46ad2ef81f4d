"""How connections to endpoints are told from those of others on the node: workers set it, steering looks for it."""

from __future__ import annotations

# SO_PRIORITY; up to 6 nobody needs a right to set it. 4 is in the same band of pfifo_fast as the default, and no kernel
# changes it when the socket is closed. IPv4 sockets of others have it too where they set a DSCP that means it.
OWN_PRIORITY = 4
