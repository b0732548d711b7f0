"""What the draws of a step depend on, beside their logits: one `SampleRow` for each. No torch."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from common.engine.batch import SampleRow
from common.engine.sequence import Sequence


def sample_row(seq: Sequence, drafts: Tokens[int] = ()) -> SampleRow:
    """The draw behind the tokens of `seq` and these drafts, as if they were right."""
    history = needs_history(seq)
    return SampleRow(
        seed=(seq.sampling.seed or 0) % 2**64,
        choice=seq.choice,
        output_index=seq.num_output + seq.num_pending + len(drafts),
        params=seq.sampling,
        prompt_ids=seq.token_ids[: seq.num_prompt] if history else (),
        output_ids=[*seq.token_ids[seq.num_prompt :], *drafts] if history else (),
        stop_ids=seq.stop_ids,
    )


def sample_rows(seq: Sequence, drafts: Tokens[int]) -> list[SampleRow]:
    """The draw behind the last token, and behind each draft as if it and those before it were right."""
    if not drafts:
        return [sample_row(seq)]
    return [sample_row(seq, drafts[:i]) for i in range(len(drafts) + 1)]


def needs_history(seq: Sequence) -> bool:
    """Does its next draw depend on which tokens it has?"""
    params = seq.sampling
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
