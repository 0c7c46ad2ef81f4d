"""SCTP: its listener, and the relay of one association. Imported behind the feature gate alone."""
