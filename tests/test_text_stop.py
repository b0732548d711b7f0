from __future__ import annotations

import time
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.text import StopAutomaton, StopMatcher


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The first stop string to be complete, the longest of those complete at the same place."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None, list[str]]:
    matcher = StopMatcher(StopAutomaton(stops), include_stop=include)
    out = [matcher.push(piece) for piece in pieces]
    return "".join(out) + matcher.flush(), matcher.matched, out


@given(
    text=st.text("ab\n#é🙂", max_size=40),
    stops=st.lists(st.text("ab\n#é🙂", min_size=1, max_size=6), min_size=1, max_size=4),
    include=st.booleans(),
    cuts=st.lists(st.integers(0, 40), max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_any_split_gives_the_same(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    marks = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    pieces = [text[a:b] for a, b in pairwise(marks)]
    got, matched, _ = run(pieces, stops, include)
    assert (got, matched) == reference(text, stops, include)


def test_every_split_of_a_stop_string_is_found_and_nothing_leaks() -> None:
    text, stop = "Hello ###END and more", "###END"
    for count in range(4):
        for cuts in combinations(range(1, len(text)), count):
            marks = [0, *cuts, len(text)]
            pieces = [text[a:b] for a, b in pairwise(marks)]
            got, matched, out = run(pieces, [stop])
            assert (got, matched) == ("Hello ", stop)
            assert not any("#" in piece for piece in out)


def test_held_text_returns_when_it_was_no_stop() -> None:
    matcher = StopMatcher(StopAutomaton(["<end>"]))
    assert matcher.push("a<en") == "a"
    assert matcher.push("g") == "<eng"
    assert matcher.push("<e") == ""
    assert matcher.flush() == "<e"


def test_after_the_match_nothing_more() -> None:
    matcher = StopMatcher(StopAutomaton(["x"]), include_stop=True)
    assert matcher.push("abxcd") == "abx"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""
    assert matcher.matched == "x"


def test_overlapping_strings_earliest_end_wins_then_longest() -> None:
    assert run(["xabcd"], ["bcd", "ab"])[:2] == ("x", "ab")
    assert run(["xabc"], ["c", "abc"])[:2] == ("x", "abc")
    assert run(["aab"], ["ab"])[:2] == ("a", "ab")


@pytest.mark.parametrize("stops", [[], [""], ["a", ""]])
def test_empty_stops_are_an_error(stops: list[str]) -> None:
    with pytest.raises(ValueError, match="empty"):
        StopAutomaton(stops)


def test_cost_is_linear_for_hostile_strings() -> None:
    automaton = StopAutomaton(["a" * 500 + "b", "a" * 499 + "c"])

    def seconds(length: int) -> float:
        matcher = StopMatcher(automaton)
        start = time.process_time()
        for _ in range(length):
            matcher.push("a")
        return time.process_time() - start

    seconds(1000)
    assert seconds(40000) < 40 * max(seconds(4000) for _ in range(3))
