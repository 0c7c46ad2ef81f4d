"""What tells others how the daemon is: health, metrics, profiling, the service manager."""
