"""Objects from files: finding, reading, watching and merging manifests."""
