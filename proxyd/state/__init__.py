"""From objects to what the node should have open: Snapshot -> DesiredState -> Plan.

All of it is pure functions of immutable values. A *snapshot* has every object known at one moment. The
*desired state* has every listener, balancer and address that the node should have for it. A *plan* is the
difference between two host states.
"""
