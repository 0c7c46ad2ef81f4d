"""What joins the sources into one snapshot: manifests, the API server, and the merge of both."""
