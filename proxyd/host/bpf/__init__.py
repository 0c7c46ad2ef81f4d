"""bpf(2): programs made by a small assembler, maps, and links that attach programs to this network namespace."""
