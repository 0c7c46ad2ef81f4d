"""The sources of objects: manifests, with controllers in place of a cluster's, and the API server."""
