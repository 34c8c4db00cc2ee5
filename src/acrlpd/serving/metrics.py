"""Metrics of a server in Prometheus' text format."""

from __future__ import annotations

from acrlpd.serving.batching import Batcher

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class ServerMetrics:
    """The metrics of one server, in their own registry."""

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ImportError("the server needs an extra: pip install 'acrlpd[serving]'") from error
        self._registry = registry = prometheus.CollectorRegistry()
        self._expose = prometheus.generate_latest
        self.connections = prometheus.Gauge("acrlpd_connections", "Open connections", registry=registry)
        self.step = prometheus.Gauge("acrlpd_checkpoint_step", "Update of the checkpoint served", registry=registry)
        self.requests = prometheus.Counter(
            "acrlpd_requests", "Requests by outcome: ok, refused, invalid, error", ["outcome"], registry=registry
        )
        self.rejected = prometheus.Counter(
            "acrlpd_rejected_connections", "Connections not let in", ["reason"], registry=registry
        )
        self.reloads = prometheus.Counter("acrlpd_reloads", "Checkpoints reloaded", ["outcome"], registry=registry)
        self.latency = prometheus.Histogram(
            "acrlpd_request_seconds",
            "From a whole request to its answer being ready",
            buckets=SECONDS,
            registry=registry,
        )
        self.model = prometheus.Histogram(
            "acrlpd_model_seconds", "One batched call of the policy", buckets=SECONDS, registry=registry
        )
        self.batch = prometheus.Histogram(
            "acrlpd_batch_requests", "Requests in a call", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.padding = prometheus.Counter("acrlpd_padding_rows", "Rows computed for no request", registry=registry)
        self._waiting = prometheus.Gauge("acrlpd_waiting_requests", "Requests in the queue", registry=registry)

    def watch(self, batcher: Batcher) -> None:
        self._waiting.set_function(lambda: batcher.waiting)

    def count_batch(self, requests: int, size: int, seconds: float) -> None:
        self.batch.observe(requests)
        self.padding.inc(size - requests)
        self.model.observe(seconds)

    def text(self) -> str:
        return self._expose(self._registry).decode()
