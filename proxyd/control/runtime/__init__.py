"""What every part of the process uses: logs, the access log, tasks, signal masks, garbage collection."""
