"""Images that cannot be had, or are none: one failure, of the request that brought them, and nothing left of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from engine_support import Pair, Solo, greedy
from media_support import COUNT, ONE, THREE, ask, folder, handles, settle
from vision_support import illustrated, oracle_tokens

from common.engine.media import Fetched
from common.engine.media_local import LocalMedia
from common.errors import UnavailableError

__all__ = ["folder"]


def test_rows_that_cannot_be_had_are_one_failure(folder: Path) -> None:
    source = LocalMedia()
    solo = Solo(folder, media=source)
    prompt = illustrated(folder, THREE, 75)
    given = handles(source, prompt)
    source.drop(given[1])
    answer = solo.submit(prompt.tokens, greedy(COUNT, n=2), embeddings=given)
    solo.run()
    assert answer.failure is not None
    assert (answer.failure.code, answer.failure.param) == ("not_found", "embeddings")
    assert not answer.tokens
    assert solo.decode.parts.media.num_fetching == 0
    solo.check_idle()


def test_the_source_says_why(folder: Path) -> None:
    class Broken(LocalMedia):
        def poll(self) -> Sequence[Fetched]:
            return [Fetched(f.ticket, None, UnavailableError("the encoder is gone")) for f in super().poll()]

    source = Broken()
    solo = Solo(folder, media=source)
    answer = ask(solo, source, illustrated(folder, ONE, 76))
    solo.run()
    assert answer.failure is not None
    assert (answer.failure.code, answer.failure.message) == ("unavailable", "the encoder is gone")


SHORT = torch.zeros(20, 192, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("rows", [torch.zeros(20, 64), torch.zeros(20, 192, dtype=torch.int64), SHORT, None])
def test_rows_of_another_shape_are_refused(folder: Path, rows: torch.Tensor | None) -> None:
    class Wrong(LocalMedia):
        def poll(self) -> Sequence[Fetched]:
            return [Fetched(f.ticket, rows) for f in super().poll()]

    source = Wrong()
    solo = Solo(folder, media=source)
    answer = ask(solo, source, illustrated(folder, ONE, 77))
    solo.run()
    assert answer.failure is not None
    assert "[20, 192]" in answer.failure.message


@pytest.mark.parametrize("number", [math.nan, -math.inf])
def test_rows_that_are_no_numbers_spoil_nothing(folder: Path, number: float) -> None:
    """They would stay in the prefix cache under their image's hash, for those who come with the right ones."""
    source = LocalMedia()
    solo = Solo(folder, media=source)
    prompt = illustrated(folder, ONE, 79)
    (good,) = handles(source, prompt)
    rows_NW = prompt.pictures[0].rows_NW.clone()
    rows_NW[3, 5] = number
    bad = source.put(good.position, rows_NW, good.grid, good.media_hash)
    answer = solo.submit(prompt.tokens, greedy(COUNT), embeddings=(bad,))
    solo.run(answer)
    assert answer.failure is not None
    assert (answer.failure.code, answer.failure.param) == ("invalid_request", "embeddings")
    settle(solo, folder, prompt, solo.submit(prompt.tokens, greedy(COUNT), embeddings=(good,)))
    solo.check_idle()


@pytest.mark.parametrize("budget", [2048, 16])
def test_a_model_that_breaks_leaves_nothing_for_those_who_begin_alike(folder: Path, budget: int) -> None:
    """Finite rows too large for the model. What comes before them is computed beside them, and was lost with them."""
    source = LocalMedia()
    solo = Solo(folder, media=source, max_num_batched_tokens=budget)
    prompt = illustrated(folder, ONE, 80)
    (good,) = handles(source, prompt)
    bad = source.put(good.position, torch.full_like(prompt.pictures[0].rows_NW, 3.4e38), good.grid)
    for _ in range(2):
        answer = solo.submit(prompt.tokens, greedy(COUNT), embeddings=(bad,))
        solo.run(answer)
        assert answer.failure is not None
        assert "not finite" in answer.failure.message
        solo.decode.parts.cache.check()
        held = ask(solo, source, prompt, params=greedy(40))
        solo.step()  # whoever holds a prefix that is forgotten goes on
    solo.run()
    assert held.tokens[0] == oracle_tokens(folder, prompt, 40)
    settle(solo, folder, prompt, ask(solo, source, prompt))
    solo.check_idle()


@pytest.mark.parametrize("budget", [2048, 32])
def test_nor_on_the_worker_that_computed_its_prompt(folder: Path, budget: int) -> None:
    source = LocalMedia()
    pair = Pair(folder, prefill={"media": source, "max_num_batched_tokens": budget}, media=source)
    prompt = illustrated(folder, ONE, 81)
    (good,) = handles(source, prompt)
    bad = source.put(good.position, torch.full_like(prompt.pictures[0].rows_NW, 3.4e38), good.grid)
    answer = pair.submit(prompt.tokens, greedy(COUNT), embeddings=(bad,))
    pair.run(answer)
    assert answer.failure is not None
    assert "not finite" in answer.failure.message
    assert pair.prefill.parts.supply.failed == {"internal": 1}
    pair.check_idle()
    answer = ask(pair, source, prompt)
    settle(pair, folder, prompt, answer)
    assert not answer.stats.fallback
    pair.check_idle()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position": 21}, "not all placeholders"),
        ({"position": 300}, "is at tokens [300, 320)"),
        ({"position": -1}, "is at tokens [-1, 19)"),
        ({"hidden_size": 64}, "takes 192"),
        ({"grid": (1, 4, 4)}, "has a grid of (1, 4, 4) and 20 rows"),
        ({"grid": (1, -4, -5)}, "has a grid"),
        ({"media_hash": b""}, "media hash of 0 bytes"),
    ],
)
def test_handles_that_do_not_fit_are_refused(folder: Path, change: dict[str, Any], words: str) -> None:
    source = LocalMedia()
    solo = Solo(folder, media=source)
    prompt = illustrated(folder, ONE, 78)
    (handle,) = handles(source, prompt)
    answer = solo.submit(prompt.tokens, greedy(1), embeddings=(msgspec.structs.replace(handle, **change),))
    solo.step()
    assert answer.failure is not None
    assert (answer.failure.code, answer.failure.param) == ("invalid_request", "embeddings")
    assert words in answer.failure.message


def test_overlapping_handles_and_an_engine_without_a_source_are_refused(folder: Path) -> None:
    source = LocalMedia()
    prompt = illustrated(folder, ONE, 79)
    (handle,) = handles(source, prompt)
    for solo, given, words in (
        (Solo(folder, media=source), (handle, handle), "begins before token 42"),
        (Solo(folder), (handle,), "no source of image embeddings"),
    ):
        answer = solo.submit(prompt.tokens, greedy(1), embeddings=given)
        solo.step()
        assert answer.failure is not None
        assert words in answer.failure.message
