"""Follows the sources, manifests and an API server, and joins their objects into one snapshot."""
