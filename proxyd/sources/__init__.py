"""Where objects come from: manifests with the controllers that stand in for a cluster's, and the API server."""
