"""The gateway that people write themselves, as a peer of the benchmark."""
