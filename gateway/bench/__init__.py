"""``make bench-gateway``: the gateway beside its peers, on the same mock services, in one run."""
