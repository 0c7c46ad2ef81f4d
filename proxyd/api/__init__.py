"""Kubernetes objects as frozen structs: decoding, defaults, validation with field paths.

All of it is pure: plain values in, plain values out, without sockets, clock or files.
"""
