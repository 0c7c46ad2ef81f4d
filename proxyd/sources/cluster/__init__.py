"""The API source: Services, their endpoints and this node as a Kubernetes API server has them.

The contract, for whoever wires it up:

    access = load_access(kubeconfig, master)            # KubeconfigError: one line; "" and "" = in the Pod
    source = ClusterSource(access, node_name=..., kubeconfig=kubeconfig, master=master, qps=5, burst=10,
                           on_change=..., on_problem=..., on_solved=...)
    task = spawn(source.run(), name="source:cluster", on_failure=...)   # runs until it is cancelled

- Nothing is said before everything has been listed: the first `on_change(state)` comes when `source.synced` turns True. A
  server that is away at start is waited for, and told of by `on_problem`.
- `state.services` and `state.slices` are what `Snapshot` takes. They are never changed in place. What did not change is the
  very same object as before, so the planner's memory by identity holds, also through a relist; a relist that brings the
  same state calls nobody. Changes come at most every 10 ms: what is more comes together.
- While the API server is away nothing changes, and `on_change` is not called.
- Whatever goes wrong is one `Problem` through `on_problem`, once; one line through `on_solved` when it is over. An object that
  cannot be used is such a problem too: its earlier version stays in force. `source.problems` has what is wrong now.
- `state.node`: `.zone` for NodeView.zone, `.pod_cidrs` for NodeCIDR, `.eligible` for nodeEligible (None: the Node is not known).
- `source.stats` is for the rest_client_* metrics; `source.last_event_at` and `source.endpoints_api` for the status.
- `source.post_event(EventAbout(...), "Warning", "PortConflict", "...")` returns at once.

Everything happens in the event loop that `run` is in, and all callbacks are called there.

aiohttp carries the requests and msgspec decodes them; lists and watches are proxyd's own (`watching`), and so are
kubeconfigs and credentials: client libraries fail a list for one bad object, lose deletions when a watch expires, and do
not renew certificates or ask credential plugins of today's version.
"""

from proxyd.sources.cluster.events import EventAbout
from proxyd.sources.cluster.kubeconfig import Access, KubeconfigError, load_access
from proxyd.sources.cluster.objects import Node
from proxyd.sources.cluster.source import ClusterSource, ClusterState
from proxyd.sources.cluster.stats import DURATION_BOUNDS, RequestStats
from proxyd.sources.cluster.steps import Tuning

__all__ = [
    "DURATION_BOUNDS",
    "Access",
    "ClusterSource",
    "ClusterState",
    "EventAbout",
    "KubeconfigError",
    "Node",
    "RequestStats",
    "Tuning",
    "load_access",
]
