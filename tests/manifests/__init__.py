"""Checks of the rendered Kubernetes manifests. Each gives its findings as text, so that tests can see that it finds."""
