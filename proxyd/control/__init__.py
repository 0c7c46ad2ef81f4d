"""The control process: settings, reconciler, supervisor of workers, admin API, logs."""
