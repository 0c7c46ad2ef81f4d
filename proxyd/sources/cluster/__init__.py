"""The API source: Services, their endpoints and this node as a Kubernetes API server has them.

The contract, for whoever wires it up:

    access = load_access(kubeconfig, master)            # KubeconfigError: one line; "" and "" = in the Pod
    source = ClusterSource(access, node_name=..., kubeconfig=kubeconfig, master=master, qps=5, burst=10,
                           on_change=..., on_problem=..., on_solved=...)
    task = spawn(source.run(), name="source:cluster", on_failure=...)   # runs until it is cancelled

- `on_change(state)` is called first when everything has been listed; then `source.synced` is True. A server
  that is away at start is waited for, and `on_problem` says so.
- `state.services` and `state.slices` are what `Snapshot` takes. They are never changed in place. An object
  that did not change is the same Python object as before, also after a relist, so the planner can compare by
  identity. A relist without a change calls nobody. `on_change` is called at most every 10 ms: changes in
  between come together.
- While the API server is away nothing changes, and `on_change` is not called.
- `on_problem` gets each `Problem` once, and `on_solved` one line when it is over. An object that cannot be
  used is such a problem too: its earlier version stays in force. `source.problems` are those of now.
- `state.node` (None: not known): `.zone` is for NodeView, `.pod_cidrs` for NodeCIDR, `.eligible` for health.
- `source.stats` is for the rest_client_* metrics; `last_event_at` and `endpoints_api` are for the status.
- `source.post_event(EventAbout(...), "Warning", "PortConflict", "...")` returns at once.

Everything happens in the event loop that `run` is in, and all callbacks are called there.

aiohttp carries the requests, and msgspec decodes the answers. Lists and watches (`watching`), kubeconfigs and
credentials are proxyd's own: client libraries fail a list for one bad object, lose deletions when a watch
expires, do not read replaced certificates again, and do not know today's version of credential plugins.
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
