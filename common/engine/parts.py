"""What an engine is made of."""

from __future__ import annotations

from dataclasses import dataclass

from common.engine.demand import Demand
from common.engine.drafting import Drafting
from common.engine.first_tokens import DrawsBeside
from common.engine.load import LoadMeter
from common.engine.media import Media
from common.engine.outbox import Outbox
from common.engine.rank_runner import Runner
from common.engine.requests import Requests
from common.engine.scheduler import Scheduler
from common.engine.speculative import Speculator
from common.engine.structured import GrammarPool
from common.engine.structured_masks import StepMasks
from common.engine.supply import Supply
from common.kvcache.layout import KVLayout
from common.kvcache.manager import KVCacheManager
from common.kvtransfer.session import HandoffReader
from common.types import Clock


@dataclass(frozen=True)
class EngineParts:
    """Everything an engine is made of; `build.py` makes them for a config, tests make their own."""

    layout: KVLayout
    cache: KVCacheManager
    scheduler: Scheduler
    requests: Requests
    media: Media
    demand: Demand
    reader: HandoffReader
    supply: Supply
    runner: Runner
    outbox: Outbox
    meter: LoadMeter
    clock: Clock
    masks: StepMasks
    grammars: GrammarPool | None = None
    speculator: Speculator | None = None
    drafting: Drafting | None = None
    check_ledger: bool = False
    overlap: bool = False  # a step is launched before the one before is collected
    beside: DrawsBeside | None = None  # draws first tokens of handed-over prompts, if not the steps do
