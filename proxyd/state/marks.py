"""What packets carry so that steering tells them apart: a bit of their mark, and a priority."""

from __future__ import annotations

# Of other programs kube-proxy has 0x4000 and 0x8000, portmap 0x2000, Cilium 0x0f00 and the upper half, Calico
# and Tailscale a part of the upper half.
DEFAULT_MARK = 0x1000

# SO_PRIORITY of the workers' connections to endpoints: up to 6 it takes no right. 4 is in the same band of
# pfifo_fast as the default, and closing a socket does not change it. Without it a socket has it only where it
# was given a DSCP that means it.
OWN_PRIORITY = 4
