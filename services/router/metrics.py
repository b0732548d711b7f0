"""What the router counts. Names as in vLLM and SGLang where they have one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import Counter
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from common.telemetry import Metrics
from common.telemetry.metrics import PREFIX, buckets_of


class Samples:
    """One series of a histogram that is observed per token or request: two additions, no lock, one thread."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """(bound, how many are not above it), as Prometheus counts."""
        out: list[tuple[str, float]] = []
        below = 0
        for bound, count in zip([*map(str, map(float, self._bounds)), "+Inf"], self.counts, strict=True):
            below += count
            out.append((bound, below))
        return out


class SampledHistogram(Collector):
    """A histogram with one series per model. Its buckets follow the unit at the name's end."""

    def __init__(self, metrics: Metrics, name: str, help: str) -> None:
        self._name = PREFIX + name
        self._help = help
        self._bounds = buckets_of(name)
        self._series: dict[str, Samples] = {}
        metrics.registry.register(self)

    def of(self, model: str) -> Samples:
        return self._series.setdefault(model, Samples(self._bounds))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=["model_name"])
        for model, samples in self._series.items():
            family.add_metric([model], samples.buckets(), samples.total)
        yield family


class Histograms:
    """Those with a series per model."""

    def __init__(self, metrics: Metrics) -> None:
        self.first_token = SampledHistogram(metrics, "time_to_first_token_seconds", "Request -> first token.")
        self.inter_token = SampledHistogram(metrics, "inter_token_latency_seconds", "Between tokens.")
        self.e2e = SampledHistogram(metrics, "e2e_request_latency_seconds", "Request -> last token.")
        self.tokenize = SampledHistogram(metrics, "request_tokenize_seconds", "Template and tokenizer.")
        self.request_prompt = SampledHistogram(metrics, "request_prompt_tokens", "Prompt tokens per request.")
        self.request_output = SampledHistogram(metrics, "request_generation_tokens", "Output tokens per request.")


class ModelMetrics:
    """The series of one model, looked up once."""

    def __init__(self, metrics: Metrics, histograms: Histograms, model: str) -> None:
        counter, label = metrics.counter, ["model_name"]
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens received.", label).labels(model)
        self.cached_tokens = counter("cached_tokens", "Prompt tokens found in a cache.", label).labels(model)
        self.generation_tokens = counter("generation_tokens", "Tokens sent to clients.", label).labels(model)
        self._success = counter("request_success", "Choices that ended.", [*label, "finished_reason"])
        self._failures = counter("request_failures", "Requests that failed.", [*label, "code"])
        self.running = metrics.gauge("num_requests_running", "Requests in the router.", label).labels(model)
        self.first_token = histograms.first_token.of(model)
        self.inter_token = histograms.inter_token.of(model)
        self.e2e = histograms.e2e.of(model)
        self.tokenize = histograms.tokenize.of(model)
        self.request_prompt = histograms.request_prompt.of(model)
        self.request_output = histograms.request_output.of(model)
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
        self._histograms = Histograms(metrics)
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
            found = self._models[model] = ModelMetrics(self.base, self._histograms, model)
        return found
