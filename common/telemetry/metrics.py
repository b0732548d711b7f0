"""Prometheus metrics of one process: a registry that is passed as an object, never a module global.

Names follow vLLM's and SGLang's with our prefix (`nanodeploy:time_to_first_token_seconds`), so that dashboards
carry over by replacing the prefix. An engine process has no registry: its counts travel up in `EngineLoad` and
are shown by `apply_engine` in the gRPC process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

PREFIX = "nanodeploy:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Bucket bounds by the unit that a histogram's name ends with.
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
BYTE_BUCKETS = tuple(2.0**n for n in range(12, 38, 2))
_BUCKETS = {
    "_seconds": LATENCY_BUCKETS_S,
    "_tokens": TOKEN_BUCKETS,
    "_sequences": TOKEN_BUCKETS,
    "_bytes": BYTE_BUCKETS,
}

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter and histogram that nobody asked for


class _EngineValues(Collector):
    """Values kept elsewhere. A name that ends in `_total` is a counter since the engine's start, others are gauges."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.labelled: dict[str, tuple[str, Sequence[tuple[str, float]]]] = {}

    def collect(self) -> Iterator[Metric]:
        for name, value in self.values.items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(name.removesuffix("_total"), f"Engine: {_words(name)}", value=value)
        for name, (label, values) in self.labelled.items():
            counter = CounterMetricFamily(name.removesuffix("_total"), f"Engine: {_words(name)}", labels=(label,))
            for of_label, value in values:
                counter.add_metric((of_label,), value)
            yield counter


def buckets_of(name: str) -> Sequence[float]:
    """Upper bounds by the unit at a name's end."""
    return next((bounds for unit, bounds in _BUCKETS.items() if name.endswith(unit)), LATENCY_BUCKETS_S)


class Metrics:
    """The metrics of one process. Asking again for a name returns the same metric."""

    def __init__(self, *, with_process: bool = True) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._made: dict[str, Counter | Gauge | Histogram] = {}
        self._engine = _EngineValues()
        self.registry.register(self._engine)
        if with_process:
            ProcessCollector(registry=self.registry)

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Counter:
        """`name` has no prefix and no `_total`: both are added."""
        made = self._made.get(name) or Counter(PREFIX + name, help, labels, registry=self.registry)
        assert isinstance(made, Counter), f"{name} is no counter"
        self._made[name] = made
        return made

    def gauge(self, name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
        made = self._made.get(name) or Gauge(PREFIX + name, help, labels, registry=self.registry)
        assert isinstance(made, Gauge), f"{name} is no gauge"
        self._made[name] = made
        return made

    def histogram(
        self, name: str, help: str, labels: Sequence[str] = (), buckets: Sequence[float] | None = None
    ) -> Histogram:
        """Buckets follow the unit at the name's end (`_seconds`, `_tokens` ...) unless given."""
        made = self._made.get(name)
        if made is None:
            made = Histogram(PREFIX + name, help, labels, registry=self.registry, buckets=buckets or buckets_of(name))
            self._made[name] = made
        assert isinstance(made, Histogram), f"{name} is no histogram"
        return made

    def apply_engine(
        self,
        counters: Iterable[tuple[str, float]],
        histograms: Iterable[tuple[str, Sequence[float]]],
        labelled: Iterable[tuple[str, str, Sequence[tuple[str, float]]]] = (),
    ) -> None:
        """Take over an `EngineLoad`: `..._total` are values since the engine's start, histograms are new samples.

        `labelled`: counters by (name, label, values by label's value).
        """
        for name, value in counters:
            self._engine.values[PREFIX + name] = value
        for name, label, values in labelled:
            self._engine.labelled[PREFIX + name] = (label, values)
        for name, samples in histograms:
            histogram = self.histogram(name, f"Engine: {_words(name)}")
            for sample in samples:
                histogram.observe(sample)

    def render(self) -> bytes:
        """The text that `/metrics` answers, of type `CONTENT_TYPE`."""
        return generate_latest(self.registry)


def _words(name: str) -> str:
    return name.removeprefix(PREFIX).replace("_", " ")
