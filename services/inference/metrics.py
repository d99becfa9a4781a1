"""Prometheus metrics of generation."""

from prometheus_client import Counter, Gauge, Histogram

WAITING = Gauge("fedward_inference_waiting", "Requests that wait for a place in a batch")
ROWS = Histogram("fedward_inference_step_rows", "Tokens written in one step", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
TOKENS = Counter("fedward_inference_generated_tokens_total", "Tokens generated")
