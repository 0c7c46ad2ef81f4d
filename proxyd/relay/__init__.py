"""The data plane: a worker process that accepts, balances and relays.

A worker imports nothing of the upper rooms, so that it stays small. Its words: a *listener* accepts, a
*balancer* chooses the endpoint, a *relay* joins one client with its endpoint, and the *poller* is the one
edge-triggered epoll that they all share. What a worker's relays share is its *plane*. Control tells a worker
what to do in `ipc.messages`; both count in `ipc.slots`, in shared memory.
"""
