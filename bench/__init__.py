"""Side-by-side measurements of proxyd and other proxies: `python -m bench --help`; docs/performance.md says how.

cli        what to run, and what is missing
sections   the measurements, one function for each; sizes (sections_scale) and UDP (sections_udp) apart
harness    what they use: network, pods, proxies to start, loads to run
peers      HAProxy, nginx and Envoy as the bench runs them; ours: proxyd
net, pods  namespaces, and what answers behind the proxies
load, datagrams   what asks: programs of their own, and wrk and iperf3
processes  CPU and memory of a process tree, from /proc
metrics    what is measured: names, units, which way is better
about      machine and versions
report     medians, ratios, tables; page: docs/performance.md and its plot

The other files are benches of one part, run by themselves.
"""
