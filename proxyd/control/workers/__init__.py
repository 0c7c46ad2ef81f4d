"""The worker processes: starting them, telling them, handing them over at an upgrade."""
