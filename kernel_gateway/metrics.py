"""What the server counts for Prometheus. Nothing that a user or a guest has chosen is in a name or a label."""

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

QUICK = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
"""Bounds of histograms, in seconds."""


class Metrics:
    """The counters of one server. Each is counted where what it counts happens."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "cellvm_requests", "Answers, by the path of their route.", ["method", "route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "cellvm_request_seconds", "Time from a request's head to the end of its answer.", ["method", "route"],
            buckets=QUICK, registry=self.registry,
        )  # fmt: skip
        self.errors = Counter("cellvm_errors", "Errors that were answered, by code.", ["error"], registry=self.registry)
        self.creates = Histogram(
            "cellvm_create_seconds", "Time to a running sandbox. Its machine was in stock (pool) or not (restore).",
            ["template", "path"], buckets=QUICK, registry=self.registry,
        )  # fmt: skip
        self.failed_starts = Counter(
            "cellvm_failed_starts", "Machines that did not start for a sandbox.", ["template"], registry=self.registry
        )
        self.ends = Counter(
            "cellvm_sandboxes_ended", "Ends of sandboxes, by reason.", ["reason"], registry=self.registry
        )
