"""Whatever changes the node: routes and rules (netlink), sockets to bind, the VIP guard (nft), limits.

All of it can be undone. After a crash proxyd finds it again by its own protocol number and names.
"""
