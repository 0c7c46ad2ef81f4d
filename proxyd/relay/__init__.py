"""The data plane: a worker process that accepts, balances and relays.

A worker imports nothing of the upper rooms, so that it stays small. Its words: a *listener* accepts, a *balancer*
chooses the endpoint, a *relay* joins one accepted connection with its endpoint, the *poller* is the one edge-triggered
epoll they all share. Control tells a worker what to do by `messages`; both count in `slots` of shared memory.
"""
