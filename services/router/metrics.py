"""What the router counts. Names as in vLLM and SGLang where they have one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from common.telemetry import Metrics
from common.telemetry.metrics import PREFIX, buckets_of

Family = type[CounterMetricFamily] | type[GaugeMetricFamily]


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


class Tally:
    """One series of what is counted per request: an addition, no lock, one thread."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class Tallied(Collector):
    """A counter or a gauge with labels. `name` has no prefix and no `_total`: both are added."""

    def __init__(self, metrics: Metrics, family: Family, name: str, help: str, labels: Sequence[str]) -> None:
        self._family = family
        self._name = PREFIX + name
        self._help = help
        self._labels = labels
        self._series: dict[tuple[str, ...], Tally] = {}
        metrics.registry.register(self)

    def of(self, *labels: str) -> Tally:
        return self._series.setdefault(labels, Tally())

    def collect(self) -> Iterator[Metric]:
        family = self._family(self._name, self._help, labels=self._labels)
        for labels, tally in self._series.items():
            family.add_metric(labels, tally.value)
        yield family


class Counts:
    """Those of requests."""

    def __init__(self, metrics: Metrics) -> None:
        counter, gauge, model = CounterMetricFamily, GaugeMetricFamily, ["model_name"]
        self.prompt_tokens = Tallied(metrics, counter, "prompt_tokens", "Prompt tokens received.", model)
        self.cached_tokens = Tallied(metrics, counter, "cached_tokens", "Prompt tokens found in a cache.", model)
        self.generation_tokens = Tallied(metrics, counter, "generation_tokens", "Tokens sent to clients.", model)
        self.success = Tallied(metrics, counter, "request_success", "Choices that ended.", [*model, "finished_reason"])
        self.failures = Tallied(metrics, counter, "request_failures", "Requests that failed.", [*model, "code"])
        self.running = Tallied(metrics, gauge, "num_requests_running", "Requests in the router.", model)


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

    def __init__(self, counts: Counts, histograms: Histograms, model: str) -> None:
        self.prompt_tokens = counts.prompt_tokens.of(model)
        self.cached_tokens = counts.cached_tokens.of(model)
        self.generation_tokens = counts.generation_tokens.of(model)
        self.running = counts.running.of(model)
        self._success = counts.success
        self._failures = counts.failures
        self.first_token = histograms.first_token.of(model)
        self.inter_token = histograms.inter_token.of(model)
        self.e2e = histograms.e2e.of(model)
        self.tokenize = histograms.tokenize.of(model)
        self.request_prompt = histograms.request_prompt.of(model)
        self.request_output = histograms.request_output.of(model)
        self._model = model

    def ended(self, finish: str) -> None:
        self._success.of(self._model, finish).inc()

    def failed(self, code: str) -> None:
        self._failures.of(self._model, code).inc()


class RouterMetrics:
    def __init__(self, metrics: Metrics) -> None:
        self.base = metrics
        self._models: dict[str, ModelMetrics] = {}
        self._counts = Counts(metrics)
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
            found = self._models[model] = ModelMetrics(self._counts, self._histograms, model)
        return found
