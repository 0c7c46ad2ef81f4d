"""proxyd: a userspace TCP, UDP and SCTP service proxy for Linux nodes."""

__version__ = "0.2.0"
