"""What makes the node and the workers agree with the desired state."""
