"""Kubernetes objects as frozen structs: decoding, defaults, validation with field paths.

Everything here is pure: plain values in, plain values out. No sockets, no clock, no files.
"""
