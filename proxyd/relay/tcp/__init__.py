"""TCP: its listener, and the relay of one connection."""
