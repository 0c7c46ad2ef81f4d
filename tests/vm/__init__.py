"""A virtual machine for tests that need a kernel with SCTP: Debian's kernel under QEMU, over this machine's own files.

`python -m tests.vm --setup` once, then `python -m tests.vm COMMAND...`. What runs in it sees the same paths as here and
is root; what it writes is gone afterwards.
"""
