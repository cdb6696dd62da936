"""Prometheus metrics of the API process, the engine's numbers included; names after vLLM's, prefixed `weft_`.

Owns the registry (its own, not the client library's global one) and every metric's name, labels and buckets.
Knows nothing of HTTP or sockets: services call its methods, the engine client hands it each heartbeat once.

Labels stay bounded: `model_name` is the base, `tenant` one of the configured tenants.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

if TYPE_CHECKING:
    from weft_server.protocol import Heartbeat, TenantQueue

METRICS_CONTENT_TYPE: str = CONTENT_TYPE_LATEST

_TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_LATENCY_BUCKETS_S = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_ITERATION_BUCKETS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
_RATIO_BUCKETS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0, 4.0)
_MAX_BUCKET_TOKENS = 131_072

_ENGINE_HELP = {
    "num_requests_running": "Sequences in the engine's running set.",
    "num_requests_waiting": "Sequences waiting for admission.",
    "kv_cache_usage_perc": "Share of KV blocks in use, 0 to 1.",
    "num_preemptions": "Sequences preempted by recomputation.",
    "finetune_steps": "Optimizer steps finished.",
    "adapter_loads": "Adapters copied to the device arena.",
    "adapter_load_seconds": "Seconds that those copies took.",
    "adapter_evictions": "Adapters evicted from the device arena.",
    "adapter_moves": "Adapters moved inside the arena, to make holes larger.",
    "adapter_requests_on_device": "Requests that found their adapter on the device.",
    "adapter_requests_on_host": "Requests that found their adapter in host memory.",
    "adapter_requests_absent": "Requests whose adapter had to be fetched from the store.",
    "num_adapters_pinned": "Pinned adapters on the device.",
    "prefix_cache_queries": "Tokens looked for in the prefix cache.",
    "prefix_cache_hits": "Tokens found in the prefix cache.",
}


class Metrics:
    """All metrics of one server, labelled with the base's name."""

    def __init__(self, model_name: str, *, max_tokens: int = _MAX_BUCKET_TOKENS) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._own_names: set[str] = set()
        self._engine = _EngineCollector(model_name, self._own_names)
        self._registry.register(self._engine)
        self._ttft = self._histogram("time_to_first_token_seconds", "Time to first token.", _TTFT_BUCKETS_S)
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Time between output tokens.", _TOKEN_LATENCY_BUCKETS_S
        )
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time per output token of a request, the first excluded.",
            _TOKEN_LATENCY_BUCKETS_S,
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "Time from arrival to the last token.", _REQUEST_LATENCY_BUCKETS_S
        )
        tokens = tuple(_one_two_five(max_tokens))
        self._prompt_size = self._histogram("request_prompt_tokens", "Prompt tokens per request.", tokens)
        self._output_size = self._histogram("request_generation_tokens", "Output tokens per choice.", tokens)
        self._iteration_s = self._histogram(
            "iteration_time_seconds", "Duration of an engine iteration.", _ITERATION_BUCKETS_S
        )
        self._iteration_ratio = self._histogram(
            "iteration_time_over_prediction_ratio",
            "Measured over predicted iteration time: the cost model's error.",
            _RATIO_BUCKETS,
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.", "tenant")
        self._prompt_tokens_cached = self._counter(
            "prompt_tokens_cached", "Prompt tokens that were in the prefix cache.", "tenant"
        )
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.", "tenant")
        self._success = self._counter("request_success", "Finished choices.", "tenant", "finished_reason")
        self._failure = self._counter("request_failure", "Choices that failed.", "tenant", "code")
        self._queue_length = Gauge(
            "weft_queue_length",
            "Choices that wait for their first token.",
            ["model_name", "tenant"],
            registry=self._registry,
        )
        self._shed = self._counter(
            "requests_shed", "Choices refused because a queue was full.", "tenant", "reason"
        )
        self._http = self._counter("http_responses", "HTTP responses by status.", "status")
        self._jobs = self._counter("finetune_jobs", "Finetune jobs by final status.", "tenant", "status")
        self._publishes = self._counter(
            "adapter_publishes", "Adapter versions published.", "tenant", "source"
        )

    def queue_changed(self, tenant: str, num_choices: int) -> None:
        """So many choices of a tenant wait for their first token now."""
        self._queue_length.labels(self._model_name, tenant).set(num_choices)

    def requests_shed(self, tenant: str, reason: str, num_choices: int) -> None:
        """Count choices refused because a queue was full; `reason` is tenant_queue or server_queue."""
        self._shed.labels(self._model_name, tenant, reason).inc(num_choices)

    def prompt_accepted(self, tenant: str, num_tokens: int) -> None:
        """Count one prompt that was sent to the engine."""
        self._prompt_tokens.labels(self._model_name, tenant).inc(num_tokens)
        self._prompt_size.observe(num_tokens)

    def prompt_cached(self, tenant: str, num_tokens: int) -> None:
        """Count the tokens of a request's prompts that were in the prefix cache."""
        self._prompt_tokens_cached.labels(self._model_name, tenant).inc(num_tokens)

    def first_token(self, seconds: float) -> None:
        """Observe a choice's time to first token."""
        self._ttft.observe(seconds)

    def tokens_generated(self, tenant: str, num_tokens: int, interval_s: float | None) -> None:
        """Count the tokens of one delta.

        `interval_s` is the time since the previous delta, None for the first.
        """
        self._generation_tokens.labels(self._model_name, tenant).inc(num_tokens)
        if interval_s is not None and num_tokens:
            latency = self._itl
            for _ in range(num_tokens):
                latency.observe(interval_s / num_tokens)

    def choice_finished(
        self, tenant: str, reason: str, num_tokens: int, first_s: float | None, e2e_s: float
    ) -> None:
        """Observe a finished choice; `reason` is stop, length or abort, times are since its arrival."""
        self._success.labels(self._model_name, tenant, reason).inc()
        self._output_size.observe(num_tokens)
        self._e2e.observe(e2e_s)
        if first_s is not None and num_tokens > 1:
            self._tpot.observe((e2e_s - first_s) / (num_tokens - 1))

    def choice_failed(self, tenant: str, code: str) -> None:
        """Count a choice that ended with an error."""
        self._failure.labels(self._model_name, tenant, code).inc()

    def http_response(self, status: int) -> None:
        """Count one HTTP response."""
        self._http.labels(self._model_name, str(status)).inc()

    def job_finished(self, tenant: str, status: str) -> None:
        """Count a finetune job that reached `succeeded`, `failed` or `cancelled`."""
        self._jobs.labels(self._model_name, tenant, status).inc()

    def adapter_published(self, tenant: str, source: str) -> None:
        """Count a new adapter version; `source` is upload, path or job."""
        self._publishes.labels(self._model_name, tenant, source).inc()

    def observe_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Take over the engine's gauges, counters and iteration times. Call it exactly once per heartbeat."""
        self._engine.update(heartbeat)
        for seconds, predicted_s in heartbeat.iterations:
            self._iteration_s.observe(seconds)
            if predicted_s > 0:
                self._iteration_ratio.observe(seconds / predicted_s)

    def engine_started(self) -> None:
        """Count one more engine process that became ready; its counters begin at zero."""
        self._engine.started()

    def engine_lost(self) -> None:
        """Stop reporting the gauges of an engine that is gone."""
        self._engine.lost()

    def render(self) -> bytes:
        """The registry in Prometheus' text format."""
        return bytes(generate_latest(self._registry))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        self._own_names.add(name)
        histogram = Histogram(f"weft_{name}", text, ("model_name",), buckets=buckets, registry=self._registry)
        return histogram.labels(self._model_name)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        self._own_names.add(name)
        return Counter(f"weft_{name}", text, ("model_name", *labels), registry=self._registry)


class _EngineCollector:
    """Exposes the latest heartbeat, except what this process counts itself, with more labels.

    Counters stay monotonic over engine restarts: past engines' totals are added.
    """

    def __init__(self, model_name: str, hidden_names: Set[str]) -> None:
        self._model_name = model_name
        self._hidden_names = hidden_names
        self._lock = threading.Lock()
        self._gauges: dict[str, float] = {}
        self._queues: dict[str, TenantQueue] = {}
        self._counters: dict[str, float] = {}
        self._past: dict[str, float] = {}
        self._num_starts = 0

    def update(self, heartbeat: Heartbeat) -> None:
        with self._lock:
            self._gauges = {**heartbeat.gauges, "iteration": float(heartbeat.iteration)}
            self._queues = dict(heartbeat.queues)
            self._counters = dict(heartbeat.counters)

    def started(self) -> None:
        with self._lock:
            self._num_starts += 1
            for name, value in self._counters.items():
                self._past[name] = self._past.get(name, 0.0) + value
            self._counters = {}

    def lost(self) -> None:
        with self._lock:
            self._gauges = {}
            self._queues = {}

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            gauges = dict(self._gauges)
            counters = dict(self._past)
            for name, value in self._counters.items():
                counters[name] = counters.get(name, 0.0) + value
            num_starts = self._num_starts
            queues = dict(self._queues)
        for name in self._hidden_names:
            gauges.pop(name, None)
            counters.pop(name, None)
        for name, value in sorted(gauges.items()):
            gauge = GaugeMetricFamily(
                f"weft_{name}", _ENGINE_HELP.get(name, "Engine gauge."), labels=["model_name"]
            )
            gauge.add_metric([self._model_name], value)
            yield gauge
        yield self._of_tenants(
            "queue_drain_seconds",
            "Predicted time until a tenant's waiting choices have been admitted.",
            {tenant: queue.drain_s for tenant, queue in queues.items()},
        )
        counters["engine_starts"] = float(num_starts)
        for name, value in sorted(counters.items()):
            counter = CounterMetricFamily(
                f"weft_{name}", _ENGINE_HELP.get(name, "Engine counter."), labels=["model_name"]
            )
            counter.add_metric([self._model_name], value)
            yield counter

    def _of_tenants(self, name: str, text: str, values: Mapping[str, float]) -> Metric:
        gauge = GaugeMetricFamily(f"weft_{name}", text, labels=["model_name", "tenant"])
        for tenant, value in sorted(values.items()):
            gauge.add_metric([self._model_name, tenant], value)
        return gauge


def _one_two_five(maximum: int) -> Iterator[float]:
    """1, 2, 5, 10, 20, … up to `maximum`."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale > maximum:
                return
            yield float(step * scale)
        scale *= 10
