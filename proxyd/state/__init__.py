"""From objects to what the node should hold open: Snapshot -> DesiredState -> Plan.

Pure functions of immutable values. The words: a *snapshot* is every object known at one moment; the *desired
state* is every listener, balancer and address the node should have for it; a *plan* is the difference between
two host states.
"""
