"""What a node's proxy does beside relaying: Events, health check node ports, migration from kube-proxy."""
