"""bpf(2): programs from a small assembler, maps, and links that attach programs to this namespace."""
