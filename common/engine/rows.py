"""A plan in the runner's words: rows of tokens with their blocks, and the copies of states that come first."""

from __future__ import annotations

from collections.abc import Mapping

from common.engine.batch import Batch, BatchRow, build_batch
from common.engine.samples import sample_rows
from common.engine.scheduler import StepItem, StepPlan
from common.kvcache.manager import KVCacheManager
from common.kvcache.tables import BlockCopy


def batch_of(plan: StepPlan, cache: KVCacheManager, groups: Mapping[str, tuple[int, int]]) -> Batch:
    """`groups` as `build_batch` takes them. Blocks are reserved."""
    return build_batch([_row(item, cache) for item in plan.items], groups)


def state_copies(plan: StepPlan, cache: KVCacheManager) -> list[BlockCopy]:
    """What gives the states of sequences that start now their first values, and keeps those that may go back."""
    copies: list[BlockCopy] = []
    if not cache.snapshots.has_states:
        return copies
    for item in plan.items:
        if item.num_new:
            copies += cache.snapshots.state_origin(item.seq.seq_id)
        if item.drafts:
            copies += cache.snapshots.state_backup(item.seq.seq_id)
    return copies


def _row(item: StepItem, cache: KVCacheManager) -> BatchRow:
    seq, start, drafts = item.seq, item.start, item.drafts
    end = start + item.num_new
    is_pending = end > len(seq.token_ids)
    tail_read = tail_write = -1
    if seq.tail_ready or seq.order is not None:
        tail = cache.snapshots.tail_block(seq.seq_id)
        tail_id = -1 if tail is None else tail
        tail_read = tail_id if seq.tail_ready and not item.num_new else -1
        tail_write = tail_id if item.reaches_end and seq.order is not None else -1
    wants_logprobs = start < seq.num_prompt - 1 and seq.wants_prompt_logprobs
    embeds = seq.embeds
    return BatchRow(
        token_ids=seq.token_ids[start:end] + [0] * is_pending + list(drafts),
        start=start,
        tables=cache.block_tables(seq.seq_id),
        samples=sample_rows(seq, drafts) if item.draws else (),
        tail_read=tail_read,
        tail_write=tail_write,
        prompt_logprobs=(seq.sampling.prompt_logprobs or 0) if wants_logprobs else -1,
        prompt_targets=seq.token_ids[start + 1 : min(end + 1, seq.num_prompt)] if wants_logprobs else (),
        media=embeds.rows_between(start, end) if embeds else (),
        rope_positions_3T=embeds.rope_positions(start, end + len(drafts)) if embeds else None,
        states=cache.snapshots.state_blocks(seq.seq_id),
        pending=seq.pending_sample if is_pending else -1,
        pools=item.pools,
    )
