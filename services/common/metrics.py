"""Prometheus metrics that every HTTP process has; each process adds its own beside its code."""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("fedward_requests_total", "HTTP requests answered", ["service", "route", "status"])
SECONDS = Histogram(
    "fedward_request_seconds",
    "Time from a request's arrival to the end of its answer",
    ["service", "route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
TASKS = Gauge("fedward_asyncio_tasks", "Tasks of the event loop when the metrics were read")
