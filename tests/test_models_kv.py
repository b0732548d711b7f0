"""Layouts that follow from a spec, block counts from a budget, and the pool's views of real memory."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from models_support import CPU
from tiny_models import make_llama, make_qwen3, make_qwen3_5

from common.errors import ConfigError
from common.kvcache.layout import TAIL_GROUP, GroupSpec, KVLayout, KVPlace, RegionSpec, Retention, Sharding
from common.kvcache.pool import KVPool
from common.kvcache.tables import BlockCopy
from common.models.cache_spec import attention_cache
from common.models.kv import kv_layout, nbytes_per_token, size_num_blocks
from common.models.spec import ModelSpec

BLOCKS = {"full": 5, "window": 7, TAIL_GROUP: 3}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec.from_folder(make_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("qwen3")
    return ModelSpec.from_folder(make_qwen3(folder, sliding_window=24, num_hidden_layers=4))


def layout_of(spec: ModelSpec, kv_dtype: str = "bfloat16", tp_size: int = 1, tp_rank: int = 0) -> KVLayout:
    return kv_layout(
        spec,
        kv_dtype=kv_dtype,
        dtype="float32",
        block_size=16,
        num_blocks=BLOCKS,
        tp_size=tp_size,
        tp_rank=tp_rank,
    )


def test_full_model(llama: ModelSpec) -> None:
    layout = layout_of(llama)
    assert [(g.name, g.retention, g.block_size, g.num_blocks) for g in layout.groups] == [
        ("full", Retention.FULL, 16, 5),
        (TAIL_GROUP, Retention.SNAPSHOT, 1, 3),
    ]
    kv, tail = layout.regions
    assert (kv.name, kv.num_layers, kv.num_parts, kv.num_units, kv.width) == ("kv", 3, 2, 2, 16)
    assert (kv.dtype, kv.sharding) == ("bfloat16", Sharding.SPLIT)
    assert (tail.name, tail.dtype, tail.width, tail.sharding) == ("last_hidden", "float32", 64, Sharding.REPLICATED)
    assert layout.model_hash == llama.model_hash
    assert nbytes_per_token(layout) == {"full": 3 * 2 * 2 * 16 * 2}


def test_window_layers_have_their_own_group(hybrid: ModelSpec) -> None:
    layout = layout_of(hybrid)
    assert [(g.name, g.window) for g in layout.groups] == [("full", 0), ("window", 24), (TAIL_GROUP, 0)]
    assert [(r.name, r.num_layers) for r in layout.regions] == [("kv", 1), ("kv_window", 3), ("last_hidden", 1)]
    assert hybrid.cache.places(0) == {"kv": KVPlace("kv", "full", 0)}
    assert hybrid.cache.places(3) == {"kv_window": KVPlace("kv_window", "window", 2)}
    only = replace(hybrid, cache=attention_cache((8,) * 4, 2, 16))
    assert [g.name for g in layout_of(only).groups] == ["window", TAIL_GROUP]


def test_ranks(llama: ModelSpec) -> None:
    split = layout_of(llama, tp_size=2, tp_rank=1)
    assert split.regions[0].sharding is Sharding.SPLIT
    assert (split.place("kv").first_unit, split.place("kv").local_units) == (1, 1)
    grouped = layout_of(llama, tp_size=4, tp_rank=1)
    assert grouped.regions[0].sharding is Sharding.GROUPED
    assert (grouped.place("kv").first_unit, grouped.place("kv").local_units) == (0, 1)
    with pytest.raises(ConfigError, match="no KV layout for llama"):
        layout_of(llama, tp_size=3)


def test_rows_are_whole_words(llama: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="rows of kv: 6 in bfloat16 is not a multiple of 8 bytes"):
        layout_of(replace(llama, cache=attention_cache((0,), 2, 6)))


def sized(spec: ModelSpec, budget: int, max_model_len: int = 512, max_num_seqs: int = 4) -> dict[str, int]:
    return size_num_blocks(
        spec,
        budget,
        kv_dtype="bfloat16",
        dtype="float32",
        block_size=16,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        num_tails=2 * max_num_seqs,
        max_num_batched_tokens=64,
    )


def spent(spec: ModelSpec, blocks: dict[str, int]) -> int:
    layout = layout_of(spec)
    return sum(layout.block_nbytes(name) * n for name, n in blocks.items() if name in blocks)


@pytest.mark.parametrize("budget", [500_000, 5_000_000, 123_456_789])
def test_a_budget_is_used_and_not_exceeded(llama: ModelSpec, hybrid: ModelSpec, budget: int) -> None:
    for spec in (llama, hybrid):
        blocks = sized(spec, budget)
        assert blocks[TAIL_GROUP] == 8
        largest = max(layout_of(spec).block_nbytes(g) for g in blocks)
        assert budget - 2 * largest < spent(spec, blocks) <= budget


def test_short_budgets_share_evenly_long_ones_cap_the_window(hybrid: ModelSpec) -> None:
    tight = sized(hybrid, 800_000, max_num_seqs=64)
    assert tight["full"] - tight["window"] in range(4)
    wide = sized(hybrid, 100_000_000)
    need = -(-(24 + 64) // 16) + 1
    assert wide["window"] == 2 * 4 * need
    assert wide["full"] > 10 * wide["window"]


@pytest.mark.parametrize("model", ["llama", "hybrid"])
def test_too_small_a_budget_names_both_numbers(request: pytest.FixtureRequest, model: str) -> None:
    spec = request.getfixturevalue(model)
    layout = layout_of(spec)
    need = {"full": 32, "window": -(-(24 + 64) // 16) + 1, TAIL_GROUP: 8}
    wanted = sum(need[g.name] * layout.block_nbytes(g.name) for g in layout.groups)
    with pytest.raises(ConfigError) as raised:
        sized(spec, wanted - 1)
    assert str(wanted) in raised.value.message
    assert str(wanted - 1) in raised.value.message
    for more in range(0, 2 * wanted, 997):  # windows never take what the full group needs
        blocks = sized(spec, wanted + more)
        assert all(blocks[g.name] >= need[g.name] for g in layout.groups)
    assert "512 tokens" in raised.value.message


def test_views_lie_where_the_layout_says(hybrid: ModelSpec) -> None:
    layout = layout_of(hybrid)
    pool = KVPool(layout, None, CPU)
    for r in layout.regions:
        view, place, group = pool.region(r.name), layout.place(r.name), layout.group(r.group)
        assert view.shape == (
            group.num_blocks,
            r.num_layers,
            r.num_parts,
            place.local_units,
            group.block_size,
            r.width,
        )
        assert not view.any()
        index = [n - 1 for n in view.shape]
        block, layer, part, unit, token, column = index
        item = view.element_size()
        expected = (
            pool.bases()[r.group]
            + block * layout.block_nbytes(r.group)
            + place.offset
            + layer * place.layer_stride
            + part * place.part_stride
            + unit * place.unit_stride
            + token * place.token_stride
            + column * item
        )
        assert view[tuple(index)].data_ptr() == expected
        assert expected + item <= pool.bases()[r.group] + pool.nbytes(r.group)
        view.fill_(1.0)
    with pytest.raises(KeyError):
        pool.region("nothing")


def test_memory_given_by_address(llama: ModelSpec) -> None:
    """What the model writes through a view is what a transport sees at the address, and the reverse."""
    layout = layout_of(llama)
    sizes = {g.name: layout.block_nbytes(g.name) * g.num_blocks for g in layout.groups}
    buffers = {name: ctypes.create_string_buffer(size + 64) for name, size in sizes.items()}
    bases = {name: -(-ctypes.addressof(b) // 64) * 64 for name, b in buffers.items()}
    pool = KVPool(layout, bases, CPU)
    assert pool.bases() == bases
    kv = pool.region("kv")
    kv[2, 1, 1, 0, 5] = torch.arange(16, dtype=torch.bfloat16)
    place = layout.place("kv")
    at = bases["full"] + 2 * layout.block_nbytes("full") + place.layer_stride + place.part_stride
    at += 5 * place.token_stride
    raw = bytearray(ctypes.string_at(at, 32))
    assert torch.equal(torch.frombuffer(raw, dtype=torch.bfloat16), torch.arange(16, dtype=torch.bfloat16))
    ctypes.memset(at, 0, 32)
    assert not kv.any()
    with pytest.raises(ValueError, match="must be the CPU's"):
        KVPool(layout, bases, torch.device("meta"))


def test_off_the_cpu_each_group_has_a_padding_block(llama: ModelSpec) -> None:
    """One more than the layout counts, of which peers hear nothing."""
    layout = layout_of(llama)
    pool = KVPool(layout, None, torch.device("meta"))
    for group in layout.groups:
        assert pool.padding_block(group.name) == group.num_blocks
        assert pool.nbytes(group.name) == group.num_blocks * layout.block_nbytes(group.name)
    assert pool.region("kv").shape[0] == layout.group("full").num_blocks + 1
    with pytest.raises(AssertionError, match="on a GPU only"):
        KVPool(layout, None, CPU).padding_block("full")


def test_tails(llama: ModelSpec) -> None:
    pool = KVPool(layout_of(llama), None, CPU)
    rows = torch.randn(2, 64)
    pool.write_tail(torch.tensor([2, 0]), rows)
    assert torch.equal(pool.read_tail(torch.tensor([0, 2, 0])), rows[[1, 0, 1]])
    assert not pool.read_tail(torch.tensor([1])).any()
    got = pool.read_tail(torch.tensor([2]))
    got.zero_()
    assert torch.equal(pool.read_tail(torch.tensor([2]))[0], rows[0])
    pool.write_tail(torch.tensor([1]), rows[:1].bfloat16())
    assert torch.equal(pool.read_tail(torch.tensor([1])), rows[:1].bfloat16().float())


def test_whole_blocks_are_copied_in_order() -> None:
    """With all regions and the gaps between them; a source of -1 is zeros."""
    groups = tuple(GroupSpec(name=n, retention=Retention.SNAPSHOT, block_size=1, num_blocks=4) for n in ("a", "b"))
    regions = tuple(
        RegionSpec(
            name=f"{g}{w}",
            group=g,
            dtype="float32",
            num_layers=2,
            num_parts=1,
            num_units=3,
            width=w,
            sharding=Sharding.REPLICATED,
        )
        for g, w in (("a", 2), ("a", 10), ("b", 4))
    )
    layout = KVLayout(model_hash=b"m" * 16, groups=groups, regions=regions)
    pool = KVPool(layout, None, CPU)
    for r in regions:
        pool.region(r.name).copy_(torch.randn(pool.region(r.name).shape))
    before = {r.name: pool.region(r.name).clone() for r in regions}
    pool.copy_blocks([BlockCopy("a", 1, 3), BlockCopy("b", -1, 0), BlockCopy("a", -1, 1), BlockCopy("b", 2, 1)])
    for r in regions:
        order, zeroed = ([0, 1, 2, 1], 1) if r.group == "a" else ([0, 2, 2, 3], 0)
        expected = before[r.name][order]
        expected[zeroed] = 0
        assert torch.equal(pool.region(r.name), expected)


def test_more_memory_is_never_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    """States take their share only of what one sequence leaves."""
    spec = ModelSpec.from_folder(make_qwen3_5(tmp_path_factory.mktemp("recurrent")))
    fits = []
    for budget in range(50_000, 400_000, 1000):
        try:
            blocks = sized(spec, budget, max_model_len=256)
        except ConfigError:
            fits.append(False)
        else:
            fits.append(True)
            assert 2 <= blocks["state"] <= 8
            assert blocks["full"] * 16 >= 256
    assert fits == sorted(fits)
    assert set(fits) == {False, True}
