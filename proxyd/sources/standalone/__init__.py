"""Does the work of a cluster's controllers where there is no cluster.

It derives a Service's endpoints from Pods and hand-written Endpoints, and allocates clusterIPs and nodePorts
where none are given. All but the state file is pure: objects and earlier allocations in, a snapshot and new
allocations out; the time is an argument.
"""
