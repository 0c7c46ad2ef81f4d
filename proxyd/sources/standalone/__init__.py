"""Stands in for a cluster's controllers where there is no cluster.

Endpoints of Services from Pods and hand-written Endpoints, clusterIPs and nodePorts where none are given. Pure: objects
and earlier allocations in, a snapshot and new allocations out. No files, no clock: the time is an argument.
"""
