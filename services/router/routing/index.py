"""Who holds which prefix, from what workers say: prefix hash -> mask of workers.

A prefix hash names all tokens before it, so the radix tree of prompts is a flat table: an edge is "the next hash of the
chain", and walking it asks about all workers at once. Each worker has a bit. What a worker held under a bit is given up
by giving up the bit: it is left out of every answer at once, and swept out of the table a slice at a time.

Keys are the first 8 bytes of a hash (`hash_keys`). States are cached copies of recurrent ones, where a hit may end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from common.types.prefix import UNIT, LazyChain

_SLICE: Final = 4096


class PrefixTable:
    """At most `capacity` keys; more are not taken, and the table says that it is `full`."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: dict[int, int] = {}
        self._states: dict[int, int] = {}
        self._used = 0  # bits handed out
        self._stale = 0  # bits given up that the tables still have
        self._sweeping = 0  # those of them that this sweep ends
        self._sweep: list[tuple[dict[int, int], list[int]]] = []
        self.full = False

    def __len__(self) -> int:
        return len(self._blocks) + len(self._states)

    @property
    def room(self) -> int:
        """Keys that it would still take."""
        return self._capacity - len(self)

    # -- bits --

    def take_bit(self) -> int:
        """One for a worker that holds nothing yet."""
        bit = ~(self._used | self._stale) & ((self._used | self._stale) + 1)
        self._used |= bit
        return bit

    def give_up(self, bit: int) -> None:
        """All that was stored under it is void."""
        self._used &= ~bit
        self._stale |= bit

    def sweep(self) -> None:
        """Take some of what is void out; the bits are free again when all is."""
        if not self._sweep:
            self._used &= ~self._sweeping
            self._stale &= ~self._sweeping
            self._sweeping = self._stale
            if not self._stale:
                return
            self._sweep = [(table, list(table)) for table in (self._blocks, self._states)]
        table, keys = self._sweep[-1]
        stale = self._sweeping
        for key in keys[-_SLICE:]:
            self._drop(table, key, stale)
        del keys[-_SLICE:]
        if not keys:
            self._sweep.pop()
            self.full = self.full and len(self) >= self._capacity

    # -- contents --

    def store(self, bit: int, keys: Iterable[int], *, states: bool = False) -> bool:
        """False if there was no room for all of them."""
        table, kept = self._states if states else self._blocks, True
        room = self._capacity - len(self)
        for key in keys:
            mask = table.get(key, 0)
            if not mask:
                if room <= 0:
                    self.full, kept = True, False
                    continue
                room -= 1
            table[key] = mask | bit
        return kept

    def remove(self, bit: int, keys: Iterable[int], *, states: bool = False) -> None:
        table = self._states if states else self._blocks
        for key in keys:
            self._drop(table, key, bit)

    @staticmethod
    def _drop(table: dict[int, int], key: int, bits: int) -> None:
        mask = table.get(key)
        if mask is None:
            return
        if left := mask & ~bits:
            table[key] = left
        else:
            del table[key]

    # -- look-up --

    def reach(
        self, chain: LazyChain, num_tokens: int, block_sizes: Iterable[tuple[int, int]], with_states: int
    ) -> list[tuple[int, int]]:
        """(tokens, mask of workers that hold the first so many and not a block more), longest first.

        `block_sizes`: tokens of a block, mask of the workers that have it. A hit ends below `num_tokens`; those in
        `with_states` end at their last cached state.
        """
        hits: list[tuple[int, int]] = []
        for size, mask in block_sizes:
            if mask and num_tokens > size:
                self._walk(chain, (num_tokens - 1) // size, size // UNIT, mask, with_states, hits)
        hits.sort(reverse=True)
        return hits

    def _walk(
        self, chain: LazyChain, limit: int, stride: int, found: int, with_states: int, hits: list[tuple[int, int]]
    ) -> None:
        blocks, states, at = self._blocks.get, self._states.get, chain.at
        plain = ~with_states
        for i in range(1, limit + 1):
            key = int.from_bytes(at(i * stride)[:8], "little")
            now = blocks(key, 0) & found
            if now != found and i > 1 and (ended := found & ~now & plain):
                hits.append(((i - 1) * stride * UNIT, ended))
            found = now
            if not found:
                return
            if found & with_states and (cached := states(key, 0) & found):
                hits.append((i * stride * UNIT, cached))
        if ended := found & plain:
            hits.append((limit * stride * UNIT, ended))


class Recall:
    """What this router sent where, of late: prompts that are being computed, and workers whose events do not arrive.

    Two generations of at most `capacity` pieces; the older one is dropped every `life_s`.
    """

    PIECE = 128  # tokens
    MOST = 128  # pieces of one prompt

    def __init__(self, capacity: int, life_s: float) -> None:
        self._capacity = capacity
        self._life_s = life_s
        self._new: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self._turns_s = 0.0

    @classmethod
    def keys(cls, root: bytes, token_ids: Sequence[int]) -> list[int]:
        """One for each whole piece, of all tokens up to its end."""
        key, keys = hash(root), []
        for start in range(0, min(len(token_ids) // cls.PIECE, cls.MOST) * cls.PIECE, cls.PIECE):
            key = hash((key, tuple(token_ids[start : start + cls.PIECE])))
            keys.append(key)
        return keys

    def note(self, keys: Sequence[int], bits: int, now_s: float) -> None:
        if now_s >= self._turns_s or len(self._new) + len(keys) > self._capacity:
            self._old, self._new = self._new, {}
            self._turns_s = now_s + self._life_s
        new, old = self._new, self._old
        for key in keys:
            new[key] = new.get(key, old.get(key, 0)) | bits

    def reach(self, keys: Sequence[int], num_tokens: int, found: int, now_s: float) -> list[tuple[int, int]]:
        """As `PrefixTable.reach`."""
        hits: list[tuple[int, int]] = []
        if now_s >= self._turns_s + self._life_s:
            return hits
        new, old = self._new.get, self._old.get
        ended_at = 0
        for key in keys:
            now = (new(key, 0) | old(key, 0)) & found
            if now != found and ended_at:
                hits.append((ended_at, found & ~now))
            found = now
            if not found:
                break
            ended_at = min(ended_at + self.PIECE, num_tokens - 1)
        else:
            if found and ended_at:
                hits.append((ended_at, found))
        return hits[::-1]


class Popular:
    """How many requests of late began with the same pieces (`Recall.keys`), so as to know a hot prefix.

    Two generations of at most `capacity` pieces, each of `life_s`; the older one is dropped then.
    """

    def __init__(self, capacity: int, life_s: float, many: int) -> None:
        self._capacity = capacity
        self._life_s = life_s
        self._many = many
        self._new: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self._turns_s = 0.0

    def note(self, keys: Sequence[int], now_s: float) -> int:
        """A request with them is here. Returns how many tokens at its beginning `many` requests had before it."""
        if now_s >= self._turns_s or len(self._new) + len(keys) > self._capacity:
            self._old = self._new if now_s < self._turns_s + self._life_s else {}
            self._new, self._turns_s = {}, now_s + self._life_s
        new, old, hot = self._new, self._old.get, 0
        for key in keys:
            count = new.get(key, 0)
            new[key] = count + 1
            hot += count + old(key, 0) >= self._many
        return hot * Recall.PIECE
