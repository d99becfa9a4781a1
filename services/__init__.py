"""The HTTP services: safety classifier, constitutional critique, inference."""
