"""UDP: its listener, flows and their table, batches of datagrams."""
