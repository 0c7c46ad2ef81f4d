"""Text to documents: YAML and JSON, with the position of every value."""
