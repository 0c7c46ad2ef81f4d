"""What every protocol of the data plane uses: poller, balancer, accepting, dialling, reporting."""
