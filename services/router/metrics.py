"""What the router counts. Names as in vLLM and SGLang where they have one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import Counter
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from common.telemetry import Metrics
from common.telemetry.metrics import LATENCY_BUCKETS_S, PREFIX


class Samples:
    """One series of a histogram that is observed per token: two additions, no lock, one thread."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """(bound, how many are not above it), as Prometheus counts."""
        out: list[tuple[str, float]] = []
        below = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self.counts, strict=True):
            below += count
            out.append((bound, below))
        return out


class SampledHistogram(Collector):
    """A histogram in seconds, one series per model."""

    def __init__(self, name: str, help: str) -> None:
        self._name = PREFIX + name
        self._help = help
        self._series: dict[str, Samples] = {}

    def labels(self, model: str) -> Samples:
        return self._series.setdefault(model, Samples(LATENCY_BUCKETS_S))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=["model_name"])
        for model, samples in self._series.items():
            family.add_metric([model], samples.buckets(), samples.total)
        yield family


class ModelMetrics:
    """The series of one model, looked up once."""

    def __init__(self, metrics: Metrics, inter_token: SampledHistogram, model: str) -> None:
        counter, label = metrics.counter, ["model_name"]
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens received.", label).labels(model)
        self.cached_tokens = counter("cached_tokens", "Prompt tokens found in a cache.", label).labels(model)
        self.generation_tokens = counter("generation_tokens", "Tokens sent to clients.", label).labels(model)
        self._success = counter("request_success", "Choices that ended.", [*label, "finished_reason"])
        self._failures = counter("request_failures", "Requests that failed.", [*label, "code"])
        self.running = metrics.gauge("num_requests_running", "Requests in the router.", label).labels(model)
        histogram = metrics.histogram
        self.first_token = histogram("time_to_first_token_seconds", "Request -> first token.", label).labels(model)
        self.inter_token = inter_token.labels(model)
        self.e2e = histogram("e2e_request_latency_seconds", "Request -> last token.", label).labels(model)
        self.tokenize = histogram("request_tokenize_seconds", "Template and tokenizer.", label).labels(model)
        self.request_prompt = histogram("request_prompt_tokens", "Prompt tokens per request.", label).labels(model)
        self.request_output = histogram("request_generation_tokens", "Output tokens per request.", label).labels(model)
        self._model = model
        self._ended: dict[str, Counter] = {}

    def ended(self, finish: str) -> None:
        if (counter := self._ended.get(finish)) is None:
            counter = self._ended[finish] = self._success.labels(self._model, finish)
        counter.inc()

    def failed(self, code: str) -> None:
        self._failures.labels(self._model, code).inc()


class RouterMetrics:
    def __init__(self, metrics: Metrics) -> None:
        self.base = metrics
        self._models: dict[str, ModelMetrics] = {}
        self._inter_token = SampledHistogram("inter_token_latency_seconds", "Between tokens.")
        metrics.registry.register(self._inter_token)
        self.http = metrics.counter("http_requests", "HTTP requests by path and status.", ["path", "status"])
        self.workers = metrics.gauge("router_workers", "Members by role and state.", ["role", "state"])
        self.attached = metrics.gauge("router_attached_streams", "Decode workers with a working stream.")
        self.waiting = metrics.gauge("router_requests_waiting", "Requests that wait for a place.", ["priority"])
        self.prefix_blocks = metrics.gauge("router_prefix_index_blocks", "KV blocks that the prefix index knows.")
        self.prefix_exact = metrics.gauge("router_prefix_index_exact_workers", "Workers whose index is EXACT.")
        self.moves = metrics.gauge("router_requests_moved", "Requests taken to another worker since start.")

    def of(self, model: str) -> ModelMetrics:
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = ModelMetrics(self.base, self._inter_token, model)
        return found
