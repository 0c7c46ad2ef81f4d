"""Manifests on disk: finding, reading, watching and merging their files."""
