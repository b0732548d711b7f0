"""Random lives of sequences, leases and reads against a model of what every block holds.

The model writes a label into every position of every block: the tokens up to there, and the weights they were
computed with. Whatever happens, each position that a sequence can still see holds that sequence's own label, a
prefix hit's blocks hold the asker's labels, and what is leased does not change. Reads scribble over their
blocks until they end. A state holds the label of the position it belongs to, whatever it went through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kvcache_support import chain_of, full, manager, snapshots, tail, window

from common.kvcache.layout import TAIL_GROUP, GroupSpec
from common.kvcache.manager import PrefixHit
from common.kvcache.tables import BlockCopy
from common.types.prefix import UNIT

LENGTH = 192


def _stream(branch: int, key: int) -> list[int]:
    return [*range(branch), *(1000 * key + i for i in range(LENGTH - branch))]


STREAMS = [_stream(branch, key) for key, branch in enumerate((20, 64, 100, 140, 192), 1)]
CHAINS = [chain_of(s) for s in STREAMS]
PREFIXES = [[hash(tuple(s[:n])) for n in range(LENGTH + 1)] for s in STREAMS]

Label = tuple[object, ...]
GARBAGE: Label = ("garbage",)


@dataclass
class Seq:
    seq_id: int
    stream: int
    weights: int
    computed: int
    fetching: int = 0  # positions on their way from a peer, 0 for none
    planned: bool = False  # the manager was told so, and whole units are read
    read_id: int = 0

    def label(self, num_tokens: int) -> Label:
        return (self.weights, PREFIXES[self.stream][num_tokens])


@dataclass
class Read:
    blocks: list[tuple[str, int]] = field(default_factory=list)


class Lives(RuleBasedStateMachine):
    groups = (full(22), window(9, 56, block_size=32), snapshots(6, "state"), tail(2))

    def __init__(self) -> None:
        super().__init__()
        self.m = manager(*self.groups, events=True)
        self.positional = [g for g in self.groups if g.block_size > 1]
        self.has_tail = any(g.name == TAIL_GROUP for g in self.groups)
        self.has_state = any(g.name == "state" for g in self.groups)
        self.block_size = {g.name: g.block_size for g in self.groups}
        self.held: dict[tuple[str, int, int], Label] = {}  # (group, block, offset) -> label
        self.seqs: dict[int, Seq] = {}
        self.reads: dict[int, Read] = {}
        self.leases: dict[int, dict[tuple[str, int, int], Label]] = {}
        self.hits: list[tuple[int, PrefixHit]] = []
        self.indexed: dict[str, set[bytes]] = {g.name: set() for g in self.groups}
        self.weights = 0
        self.next_id = 1

    def _id(self) -> int:
        self.next_id += 1
        return self.next_id

    def _pick(self, n: int, *, fetching: bool) -> Seq | None:
        seqs = [s for s in self.seqs.values() if bool(s.fetching) == fetching]
        return seqs[n % len(seqs)] if seqs else None

    def _seen(self, g: GroupSpec, position: int) -> range:
        return range(max(0, position - g.window + 1) if g.window else 0, position)

    def _cells(self, seq: Seq, g: GroupSpec, positions: range) -> Iterator[tuple[int, tuple[str, int, int]]]:
        table = self.m.block_table(seq.seq_id, g.name)
        for p in positions:
            block = table[p // g.block_size]
            assert block >= 0, f"no block of {g.name} for position {p}"
            yield p, (g.name, block, p % g.block_size)

    def _write(self, seq: Seq, positions: range, *, draft: bool = False) -> None:
        for g in self.positional:
            for p, cell in self._cells(seq, g, positions):
                self.held[cell] = GARBAGE if draft else seq.label(p + 1)

    def _check_hit(self, stream: int, hit: PrefixHit) -> None:
        asker = Seq(0, stream, self.weights, 0)
        for g in self.groups:
            if g.name == TAIL_GROUP or not hit:
                assert g.name not in hit.blocks
            elif g.block_size == 1:
                assert self.held[g.name, hit.blocks[g.name][0], 0] == asker.label(hit.num_tokens)
            else:
                for p in self._seen(g, hit.num_tokens):
                    block = hit.blocks[g.name][p // g.block_size]
                    assert self.held.get((g.name, block, p % g.block_size)) == asker.label(p + 1)

    @rule(stream=st.integers(0, len(STREAMS) - 1), more=st.integers(1, 120), limit=st.integers(16, LENGTH))
    def open(self, stream: int, more: int, limit: int) -> None:
        """Start at a prefix hit, as the scheduler does."""
        hit = self.m.match_prefix(CHAINS[stream], limit)
        self._check_hit(stream, hit)
        self._start(stream, hit, more)

    @rule(stream=st.integers(0, len(STREAMS) - 1), limit=st.integers(16, LENGTH))
    def look_up(self, stream: int, limit: int) -> None:
        """Remember a hit that will be out of date when it is used."""
        self.hits.append((stream, self.m.match_prefix(CHAINS[stream], limit)))

    @precondition(lambda self: self.hits)
    @rule(n=st.integers(0, 99), more=st.integers(1, 40))
    def open_with_an_old_hit(self, n: int, more: int) -> None:
        stream, hit = self.hits.pop(n % len(self.hits))
        self._start(stream, hit, more)

    def _start(self, stream: int, hit: PrefixHit, more: int) -> None:
        seq_id = self._id()
        self.m.open(seq_id, f"seq-{seq_id}")
        before = self.m.ledger()
        want = min(hit.num_tokens + more, LENGTH)
        expected = self.m.can_reserve(seq_id, want, hit)
        assert self.m.reserve(seq_id, want, hit) == expected
        if not expected:
            assert self.m.ledger() == before
            self.m.close(seq_id)
            return
        if not self.m.snapshots.reserve_states(seq_id):
            self.m.close(seq_id)
            return
        self._check_hit(stream, hit)
        self.seqs[seq_id] = Seq(seq_id, stream, self.weights, hit.num_tokens)

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        for group, source, target in copies:
            zeros: Label = (self.weights, PREFIXES[0][0])
            self.held[group, target, 0] = self.held[group, source, 0] if source >= 0 else zeros

    def _update_state(self, seq: Seq, end: int) -> None:
        """What layers do in place: from the computed position to `end`."""
        for name, block in self.m.snapshots.state_blocks(seq.seq_id).items():
            if seq.computed:
                assert self.held[name, block, 0] == seq.label(seq.computed), f"the state is not of {seq.computed}"
            self.held[name, block, 0] = seq.label(end)

    @rule(n=st.integers(0, 99), num_new=st.integers(1, 70), rejected=st.integers(0, 6), keep=st.booleans())
    def compute(self, n: int, num_new: int, rejected: int, keep: bool) -> None:
        """A step: a chunk, or a few tokens of which some turn out to be wrong drafts; a state cannot be cut back."""
        seq = self._pick(n, fetching=False)
        if seq is None or not self.m.snapshots.reserve_states(seq.seq_id):
            return
        end = min(seq.computed + num_new, LENGTH)
        if self.has_state:
            rejected, end = 0, max(seq.computed, end - end % 16) if keep else end
        before = self.m.ledger()
        if not self.m.reserve(seq.seq_id, end):
            assert self.m.ledger() == before
            return
        kept = max(seq.computed, end - rejected)
        if kept > seq.computed:
            self._copy(self.m.snapshots.state_origin(seq.seq_id))
            self._update_state(seq, kept)
        self._write(seq, range(seq.computed, kept))
        self._write(seq, range(kept, end), draft=True)
        self.m.advance(seq.seq_id, CHAINS[seq.stream], kept)
        seq.computed = kept
        if self.has_state and kept and kept % 16 == 0:
            self._copy(self.m.snapshots.checkpoint(seq.seq_id, CHAINS[seq.stream][kept // 16]))
        if rejected % 2:
            self.m.truncate(seq.seq_id, kept)

    @rule(n=st.integers(0, 99))
    def close(self, n: int) -> None:
        if self.seqs:
            seq = self.seqs.pop(list(self.seqs)[n % len(self.seqs)])
            self.m.close(seq.seq_id)

    @rule(n=st.integers(0, 99), planned=st.booleans(), more=st.integers(1, 120), tail_too=st.booleans())
    def fetch(self, n: int, planned: bool, more: int, tail_too: bool) -> None:
        """A read brings positions of all groups, in window groups only what the end sees."""
        seq = self._pick(n, fetching=False)
        end = min(seq.computed + more, LENGTH) if seq else 0
        if seq is None or end == seq.computed or seq.computed % 32 or seq.weights != self.weights:
            return
        if not self.m.snapshots.reserve_states(seq.seq_id):
            return
        if not self.m.reserve(seq.seq_id, end, fetch_to=end if planned else 0):
            return
        self.m.truncate(seq.seq_id, end)
        seq.fetching, seq.planned, seq.read_id = end, planned, self._id()
        read = self.reads[seq.read_id] = Read()
        for g in self.positional:
            first = max(seq.computed, self._seen(g, end).start) // g.block_size
            blocks = self.m.block_table(seq.seq_id, g.name)[first:]
            read.blocks += [(g.name, b) for b in blocks]
            self.m.begin_read(seq.read_id, g.name, blocks)
        for name, block in self.m.snapshots.state_blocks(seq.seq_id).items():
            self.m.begin_read(seq.read_id, name, [block])
            read.blocks.append((name, block))
        if tail_too and self.has_tail and (block := self.m.snapshots.reserve_tail(seq.seq_id)) is not None:
            self.m.begin_read(seq.read_id, TAIL_GROUP, [block])
            read.blocks.append((TAIL_GROUP, block))

    @rule(n=st.integers(0, 99))
    def fetch_succeeds(self, n: int) -> None:
        seq = self._pick(n, fetching=True)
        if seq is None:
            return
        blocks = set(self.reads.pop(seq.read_id).blocks)
        for g in self.positional:
            table = self.m.block_table(seq.seq_id, g.name)
            first = self._seen(g, seq.fetching).start
            first = max(seq.computed, first // UNIT * UNIT if seq.planned else first)
            for p in range(first, seq.fetching):
                if (g.name, table[p // g.block_size]) in blocks:
                    self.held[g.name, table[p // g.block_size], p % g.block_size] = seq.label(p + 1)
        for name, block in self.m.snapshots.state_blocks(seq.seq_id).items():
            self.held[name, block, 0] = seq.label(seq.fetching)
        self.m.end_read(seq.read_id)
        self.m.advance(seq.seq_id, CHAINS[seq.stream], seq.fetching)
        seq.computed, seq.fetching = seq.fetching, 0
        if self.has_tail:
            self.m.snapshots.free_tail(seq.seq_id)

    @rule(n=st.integers(0, 99))
    def fetch_fails(self, n: int) -> None:
        """The sequence goes on without the blocks; the read ends later, or has ended."""
        seq = self._pick(n, fetching=True)
        if seq is None:
            return
        if n % 3 == 0:
            self.m.end_read(seq.read_id)
            del self.reads[seq.read_id]
        self.m.detach_in_flight(seq.seq_id)
        assert self.m.num_computed(seq.seq_id) <= seq.computed
        seq.computed, seq.fetching = self.m.num_computed(seq.seq_id), 0

    @precondition(lambda self: self.reads)
    @rule(n=st.integers(0, 99))
    def late_end(self, n: int) -> None:
        """A read that its sequence has left can write no more."""
        fetching = {s.read_id for s in self.seqs.values() if s.fetching}
        left = [r for r in self.reads if r not in fetching]
        if left:
            read_id = left[n % len(left)]
            del self.reads[read_id]
            self.m.end_read(read_id)

    @rule(n=st.integers(0, 99), group=st.integers(0, 1), again=st.booleans())
    def lease(self, n: int, group: int, again: bool) -> None:
        """Publish what a sequence can see, partial block included; a lease may grow."""
        seq = self._pick(n, fetching=False)
        if seq is None or not seq.computed:
            return
        g = self.positional[group % len(self.positional)]
        cells = {cell: seq.label(p + 1) for p, cell in self._cells(seq, g, self._seen(g, seq.computed))}
        lease_id = next(iter(self.leases), 0) if again else 0
        lease_id = lease_id or self._id()
        self.m.lease_pin(lease_id, g.name, sorted({block for _, block, _ in cells}))
        self.leases.setdefault(lease_id, {}).update(cells)

    @precondition(lambda self: self.leases)
    @rule(n=st.integers(0, 99))
    def unlease(self, n: int) -> None:
        lease_id = list(self.leases)[n % len(self.leases)]
        del self.leases[lease_id]
        self.m.lease_unpin(lease_id)
        self.m.lease_unpin(lease_id)

    @rule(n=st.integers(0, 99), free=st.booleans())
    def tail_row(self, n: int, free: bool) -> None:
        seq = self._pick(n, fetching=False)
        if seq is None or not self.has_tail:
            return
        if free:
            self.m.snapshots.free_tail(seq.seq_id)
            assert self.m.snapshots.tail_block(seq.seq_id) is None
        else:
            assert self.m.snapshots.reserve_tail(seq.seq_id) == self.m.snapshots.tail_block(seq.seq_id)

    @precondition(lambda self: self.next_id % 4 == 0)
    @rule(stream=st.integers(0, len(STREAMS) - 1), units=st.integers(1, LENGTH // 16))
    def forget(self, stream: int, units: int) -> None:
        chain = CHAINS[stream][: units + 1]
        self.m.forget_prefix(chain)
        assert not self.m.match_prefix(chain, units * 16)

    @precondition(lambda self: self.next_id % 8 == 0)
    @rule()
    def change_weights(self) -> None:
        self.weights += 1
        self.m.reset_prefix_cache()

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        self.m.check()
        for s, g in zip(self.m.ledger(), self.groups, strict=True):
            assert s.free + s.live + s.cached + s.leased + s.in_flight == s.total == g.num_blocks
            assert self.m.num_available(s.group) == s.free + s.cached
        owners = {f"seq-{s}" for s in self.seqs} | {f"lease:{x}" for x in self.leases} | {"cache"}
        owners |= {f"read:{r}" for r in self.reads}
        assert {e.owner for e in self.m.ledger_blocks()} <= owners

    @invariant()
    def reads_scribble(self) -> None:
        for read in self.reads.values():
            for group, block in read.blocks:
                for offset in range(self.block_size[group]):
                    self.held[group, block, offset] = GARBAGE

    @invariant()
    def every_sequence_sees_its_own(self) -> None:
        for seq in self.seqs.values():
            assert self.m.num_computed(seq.seq_id) == seq.computed
            for g in self.positional:
                for p, cell in self._cells(seq, g, self._seen(g, seq.computed)):
                    assert self.held.get(cell) == seq.label(p + 1), f"{cell} of position {p}"

    @invariant()
    def every_prefix_in_the_cache_is_true(self) -> None:
        for stream, chain in enumerate(CHAINS):
            self._check_hit(stream, self.m.match_prefix(chain, LENGTH))

    @invariant()
    def leased_contents_stay(self) -> None:
        for cells in self.leases.values():
            for cell, label in cells.items():
                assert self.held[cell] == label

    @invariant()
    def events_add_up_to_the_cache(self) -> None:
        for event in self.m.drain_events():
            if len(event) == 1:
                self.indexed = {g.name: set() for g in self.groups}
            elif len(event) == 3:
                assert set(event[2]) <= self.indexed[event[1]]
                self.indexed[event[1]] -= set(event[2])
            else:
                assert not set(event[3]) & self.indexed[event[1]]
                self.indexed[event[1]] |= set(event[3])
        for g in self.groups:
            cached = next(s.cached for s in self.m.ledger() if s.group == g.name)
            assert cached <= len(self.indexed[g.name])

    def teardown(self) -> None:
        for seq_id in list(self.seqs):
            self.m.close(seq_id)
        for read_id in list(self.reads):
            self.m.end_read(read_id)
        for lease_id in list(self.leases):
            self.m.lease_unpin(lease_id)
        self.m.check_idle()
        self.m.reset_prefix_cache()
        self.m.check_idle()
        for s in self.m.ledger():
            assert s.free == s.total, "a block leaked"


class LivesWithoutSnapshots(Lives):
    """Prefix hits are longer and more frequent where no snapshot must be met."""

    groups = (full(22), window(9, 56, block_size=32), tail(2))


class LivesInWindows(Lives):
    groups = (window(12, 40, block_size=32), window(14, 33, name="near"))


RANDOM = settings(max_examples=35, stateful_step_count=50, deadline=None, database=None)
TestLives = Lives.TestCase
TestLivesWithoutSnapshots = LivesWithoutSnapshots.TestCase
TestLivesInWindows = LivesInWindows.TestCase
TestLives.settings = TestLivesWithoutSnapshots.settings = TestLivesInWindows.settings = RANDOM
