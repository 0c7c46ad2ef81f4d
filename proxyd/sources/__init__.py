"""Where objects come from: manifests on disk, and the standalone controllers that stand in for a cluster's."""
