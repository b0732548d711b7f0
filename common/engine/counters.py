"""What an engine counts, read off those who count it; `LoadMeter` sends it, the gRPC process shows it."""

from __future__ import annotations

from dataclasses import dataclass

from common.engine.demand import Demand
from common.engine.messages import LabelledCounter, PeerTraffic
from common.engine.requests import Requests
from common.engine.speculative import Speculator, accepted_by_pos, draft_counters
from common.engine.structured import GrammarPool, grammar_counters
from common.engine.supply import Supply
from common.kernels.late import late_kernels
from common.kvcache.manager import KVCacheManager
from common.kvtransfer.leases import Leases
from common.kvtransfer.session import HandoffReader


@dataclass(frozen=True)
class EngineCounters:
    """Names are those of metrics; `..._total` are since the engine's start."""

    requests: Requests
    cache: KVCacheManager
    reader: HandoffReader
    demand: Demand
    leases: Leases
    supply: Supply
    speculator: Speculator | None
    grammars: GrammarPool | None = None

    def values(self) -> dict[str, float]:
        c = self.reader.counters
        named = {
            "generation_tokens_total": self.requests.tokens_out,
            "kv_leases_active": self.leases.num_active,
            "kv_leases_expired_total": self.leases.counters.expired,
            "kv_transfer_bytes_total": c.nbytes,
            "kv_transfer_reads_total": c.reads,
            "kv_transfer_read_seconds_total": c.read_seconds,
            "kv_digest_mismatches_total": c.mismatches,
            "kv_unknown_leases_total": self.leases.counters.lost,
            "state_snapshots_total": self.cache.snapshots.checkpoints_made,
            "state_snapshots_skipped_total": self.cache.snapshots.checkpoints_skipped,
            "handoff_orders_total": c.placed,
            "handoff_fallbacks_total": sum(self.demand.fallbacks.values()),
            "prefill_orders_finished_total": self.supply.finished,
            "prefill_orders_failed_total": sum(self.supply.failed.values()),
            "kernels_compiled_late_total": late_kernels.count,
            "kernels_compiled_late_seconds_total": late_kernels.seconds,
            **draft_counters(self.speculator),
            **grammar_counters(self.grammars),
        }
        return {name: float(value) for name, value in named.items()}

    def labelled(self) -> tuple[LabelledCounter, ...]:
        """Series with a label: regions that drafts had to do without, and right drafts by place."""
        cold = tuple((region, float(count)) for region, count in self.reader.counters.cold.items())
        found = (LabelledCounter("handoff_cold_regions_total", "region", cold),) if cold else ()
        return found + accepted_by_pos(self.speculator)

    def traffic(self) -> tuple[PeerTraffic, ...]:
        """What was read from each peer."""
        return tuple(PeerTraffic(t.peer, t.transport, t.nbytes, t.reads, t.mismatches) for t in self.reader.traffic())
