"""What changes the node: routes and rules (netlink), sockets to bind, the VIP guard (nft), limits.

Everything here can be undone, and is found again after a crash by proxyd's own protocol number and names.
"""
