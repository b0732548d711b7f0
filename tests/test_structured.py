"""Answers under a grammar, in real engines: they follow it to their end, whatever happens to them on the way."""

from __future__ import annotations

import json
import random
import re
import select
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from engine_support import Answer, Pair, Solo, greedy, hybrid, llama, prompts
from mtp_support import MTP, make_mtp
from structured_support import check, of, random_schema, schema_grammar, text_of, under

from common.engine.structured import GrammarLimits, GrammarPool, nbytes_of
from common.types import FinishReason, Grammar, GrammarKind, SamplingParams

__all__ = ["hybrid", "llama"]

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlap": {"async_scheduling": "on"},
    "speculation": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}},
    "preemption": {"max_model_len": 480, "kv_cache_memory_bytes": 448 << 10, "max_num_seqs": 8},
    "ranks": {"tensor_parallel_size": 2},
}
OBJECT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "ages": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": {"enum": ["left", "right", "straight on"]}, "minItems": 6, "maxItems": 9}


def run(solo: Solo, params: list[SamplingParams], seed: int = 0) -> list[Answer]:
    texts = prompts(seed, [random.Random(seed + i).randrange(1, 40) for i in range(len(params))])
    got = [solo.submit(text, one) for text, one in zip(texts, params, strict=True)]
    solo.run(limit=50_000)
    solo.check_idle()
    return got


def test_a_first_token_under_a_grammar_is_drawn_when_its_hand_off_has_ended(llama: Path) -> None:
    """Not while the KV is on its way, as others are: masks are made of what runs."""
    pair = Pair(llama, async_scheduling="on")
    runner, scheduler = pair.decode.parts.runner, pair.decode.parts.scheduler
    drawn: list[bool] = []
    draw = runner.draw_beside  # type: ignore[attr-defined]
    runner.draw_beside = lambda batch, masks: (  # type: ignore[attr-defined]
        drawn.append(masks is not None and not scheduler.remote),
        draw(batch, masks),
    )[1]
    pair.network.held = True
    answer = pair.submit(prompts(3, [70])[0], under(schema_grammar(LIST), seed=1, temperature=1.0))
    while pair.network.num_waiting < 2:
        pair.step()
    pair.network.step(1)
    for _ in range(3):
        pair.step()
    assert not drawn
    pair.network.held = False
    pair.network.advance()
    pair.run()
    assert drawn == [True]
    check(LIST, text_of(llama, answer.tokens[0]), answer.finish[0])
    pair.check_idle()


def many(seed: int, count: int = 24) -> tuple[list[Any], list[SamplingParams]]:
    rng = random.Random(seed)
    schemas = [random_schema(rng) for _ in range(count)]
    params = [
        under(schema_grammar(s), seed=i, temperature=rng.choice([0.0, 1.0]), n=rng.choice([1, 1, 3]))
        for i, s in enumerate(schemas)
    ]
    return schemas, params


def tokens_of(answers: list[Answer]) -> list[tuple[dict[int, list[int]], dict[int, FinishReason]]]:
    assert all(a.failure is None for a in answers), [a.failure for a in answers]
    return [(a.tokens, a.finish) for a in answers]


@pytest.mark.parametrize("mode", MODES)
def test_answers_validate_and_do_not_depend_on_how_they_were_made(mode: str, llama: Path) -> None:
    schemas, params = many(len(mode))
    solo = Solo(llama, **MODES[mode])
    got = tokens_of(run(solo, params))
    ended = 0
    for schema, (tokens, finish) in zip(schemas, got, strict=True):
        for choice, ids in tokens.items():
            check(schema, text_of(llama, ids), finish[choice])
            ended += finish[choice] is FinishReason.STOP
    assert ended > 18
    if mode not in ("plain", "ranks"):
        assert got == tokens_of(run(Solo(llama), params))
    if mode == "speculation":
        assert solo.decode.parts.speculator is not None
        assert solo.decode.parts.speculator.num_accepted_tokens > 0
    if mode == "preemption":
        assert sum(a.stats.preemptions for a in solo.answers.by_slot.values()) > 0


@pytest.mark.parametrize("mode", ["plain", "overlap", "speculation"])
def test_a_hand_off_changes_nothing(mode: str, llama: Path) -> None:
    schemas, params = many(5, 12)
    pair = Pair(llama, **MODES[mode])
    got = tokens_of(run(pair, params))
    assert got == tokens_of(run(Solo(llama), params))
    assert any(a.stats.transferred_tokens for a in pair.answers.by_slot.values())
    for schema, (tokens, finish) in zip(schemas, got, strict=True):
        check(schema, text_of(llama, tokens[0]), finish[0])


def test_states_that_go_back_change_nothing(hybrid: Path) -> None:
    _, params = many(6, 8)
    assert tokens_of(run(Solo(hybrid, **MODES["speculation"]), params)) == tokens_of(run(Solo(hybrid), params))


@pytest.mark.parametrize("more", [{}, {"async_scheduling": "on"}, {"tensor_parallel_size": 2}])
def test_drafts_of_a_prediction_layer_change_nothing(more: dict[str, Any], tmp_path: Path) -> None:
    folder = make_mtp(tmp_path, seed=4)
    schemas, params = many(7, 8)
    solo = Solo(folder, speculative_config=MTP, **more)
    got = tokens_of(run(solo, params))
    if not more.get("tensor_parallel_size"):
        assert got == tokens_of(run(Solo(folder), params))
    for schema, (tokens, finish) in zip(schemas, got, strict=True):
        check(schema, text_of(folder, tokens[0]), finish[0])
    assert solo.decode.parts.speculator is not None
    assert solo.decode.parts.speculator.num_drafts > 0


@pytest.mark.parametrize("mode", ["plain", "overlap", "speculation"])
def test_another_worker_goes_on_where_one_was_lost(mode: str, llama: Path) -> None:
    """From the tokens alone, at any place."""
    params = under(schema_grammar(LIST), seed=3)
    prompt = prompts(1, [20])[0]
    first = Solo(llama)
    whole = first.submit(prompt, params)
    first.run()
    tokens = whole.tokens[0]
    assert whole.finish[0] is FinishReason.STOP
    second = Solo(llama, **MODES[mode])
    for cut in range(1, len(tokens), 5):
        got = second.submit(prompt, params, sent=(tuple(tokens[:cut]),))
        second.run(got)
        assert got.tokens[0] == tokens
        assert got.finish[0] is FinishReason.STOP
    second.check_idle()


def test_an_answer_that_is_whole_already_ends_at_once(llama: Path) -> None:
    params = under(of(GrammarKind.CHOICE, '["left", "right"]'), n=2)
    solo = Solo(llama)
    first = solo.submit(prompts(1, [9])[0], params)
    solo.run()
    sent = tuple(tuple(first.tokens[c]) for c in range(2))
    again = solo.submit(prompts(1, [9])[0], params, sent=(sent[0],))
    solo.run()
    assert again.tokens == first.tokens
    assert again.finish == {0: FinishReason.STOP, 1: FinishReason.STOP}
    wrong = solo.submit(prompts(1, [9])[0], params, sent=((7, 9, 11, 300),))
    solo.run()
    assert wrong.failure is not None
    assert (wrong.failure.code, wrong.failure.param) == ("invalid_request", "sent")
    solo.check_idle()


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        (GrammarKind.REGEX, r"^[a-f]{2,5}-\d+\.$", r"[a-f]{2,5}-\d+\."),
        (GrammarKind.REGEX, r"(ab|c)*d\$", r"(ab|c)*d\$"),
        (GrammarKind.CHOICE, '["yes", "no", "yes and no", "quo\\"te"]', r'yes|no|yes and no|quo"te'),
        (GrammarKind.GRAMMAR, 'root ::= item ("," item)* "."\nitem ::= [0-9] | "x"', r"[0-9x](,[0-9x])*\."),
        (GrammarKind.GRAMMAR, 'start: A+ "!"\nA: /[ab]/', r"[ab]+!"),
    ],
)
@pytest.mark.parametrize("mode", ["plain", "overlap", "speculation"])
def test_other_kinds(kind: GrammarKind, source: str, pattern: str, mode: str, llama: Path) -> None:
    grammar = of(kind, source)
    more: list[dict[str, Any]] = [
        {},
        {"min_tokens": 6},
        {"ignore_eos": True},
        {"logprobs": 3},
        {"repetition_penalty": 1.3},
    ]
    got = run(Solo(llama, **MODES[mode]), [under(grammar, seed=i, max_tokens=60, **m) for i, m in enumerate(more * 4)])
    for answer in got:
        assert answer.failure is None, answer.failure
        text, finish = text_of(llama, answer.tokens[0]), answer.finish[0]
        assert finish is FinishReason.LENGTH or re.fullmatch(pattern, text), text


def test_the_end_is_where_the_grammar_may_end(llama: Path) -> None:
    """`a+` may end anywhere: by the end-of-sequence token or a stop token, which nothing else allows there."""
    solo, grammar = Solo(llama), of(GrammarKind.REGEX, "a+")
    stop = (300, 301)
    bias = {"logit_bias": ((2, 100.0),), "temperature": 0.0}
    soon, late, never, stopped = run(
        solo,
        [
            under(grammar, max_tokens=20, **bias),
            under(grammar, max_tokens=20, min_tokens=7, **bias),
            under(grammar, max_tokens=20, ignore_eos=True, **bias),
            under(grammar, max_tokens=20, temperature=0.0, stop_token_ids=stop, logit_bias=((301, 100.0),)),
        ],
    )
    assert len(soon.tokens[0]) == 2
    assert soon.tokens[0][-1] == 2
    assert len(late.tokens[0]) == 8
    assert late.tokens[0][-1] == 2
    assert never.finish[0] is FinishReason.LENGTH
    assert set(text_of(llama, never.tokens[0])) == {"a"}
    assert stopped.tokens[0][-1] == 301
    assert len(stopped.tokens[0]) == 2
    assert [a.finish[0] for a in (soon, late, stopped)] == [FinishReason.STOP] * 3


def test_a_whole_answer_needs_no_token_to_end_it(llama: Path) -> None:
    for more in ({}, {"ignore_eos": True}, {"min_tokens": 12}):
        (answer,) = run(Solo(llama), [under(of(GrammarKind.CHOICE, '["only this"]'), **{"max_tokens": 40} | more)])
        assert text_of(llama, answer.tokens[0]) == "only this"
        assert 2 not in answer.tokens[0]
        assert answer.finish[0] is FinishReason.STOP


def test_one_that_is_cut_off_says_so(llama: Path) -> None:
    (answer,) = run(Solo(llama), [under(schema_grammar(LIST), max_tokens=5)])
    assert answer.finish[0] is FinishReason.LENGTH
    assert len(answer.tokens[0]) == 5


@pytest.mark.parametrize("mode", ["plain", "overlap"])
def test_neighbours_lose_neither_tokens_nor_steps(mode: str, llama: Path) -> None:
    texts = prompts(8, [20, 30, 25])
    plain = [greedy(40, seed=i, temperature=0.8) for i in range(3)]

    def go(with_grammar: bool) -> tuple[list[dict[int, list[int]]], int]:
        solo = Solo(llama, **MODES[mode])
        if with_grammar:
            solo.submit(texts[0], under(schema_grammar(LIST)))
            while not solo.decode.parts.scheduler.has_work:
                solo.step()
        got = [solo.submit(t, p) for t, p in zip(texts, plain, strict=True)]
        started = solo.decode.engine.steps
        solo.run(*got)
        return [a.tokens for a in got], solo.decode.engine.steps - started

    alone, steps = go(with_grammar=False)
    beside, steps_beside = go(with_grammar=True)
    assert beside == alone
    assert steps_beside <= steps + 1


IMPOSSIBLE: list[tuple[GrammarKind, str, str]] = [
    (GrammarKind.JSON_SCHEMA, '{"type": "integer", "minimum": 5, "maximum": 3}', "greater than maximum"),
    (GrammarKind.JSON_SCHEMA, '{"allOf": [{"type": "string"}, {"type": "integer"}]}', "incompatible types"),
    (GrammarKind.JSON_SCHEMA, "false", "allows nothing"),
    (GrammarKind.JSON_SCHEMA, '{"type": "strin"}', "strin"),
    (GrammarKind.JSON_SCHEMA, '{"not": {"type": "string"}}', "not"),
    (GrammarKind.JSON_SCHEMA, '{"$ref": "http://127.0.0.1:9/x"}', "not present"),
    (GrammarKind.JSON_SCHEMA, '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', "impossible"),
    (GrammarKind.JSON_SCHEMA, json.dumps({"allOf": [{"$ref": "#"}] * 2001}), "2001 references"),
    (GrammarKind.REGEX, "(a", "unclosed group"),
    (GrammarKind.REGEX, r"(?<=a)b", "look-behind"),
    (GrammarKind.REGEX, "(" * 3000 + "a" + ")" * 3000, "invalid regex"),
    (GrammarKind.GRAMMAR, "start: " + "(" * 3000 + '"a"' + ")" * 3000, "nested"),
    (GrammarKind.GRAMMAR, "start: nothing_of_that_name", "nothing_of_that_name"),
    (GrammarKind.CHOICE, '[""]', "impossible"),
    (GrammarKind.STRUCTURAL_TAG, '{"format": {"type": "poem"}}', "poem"),
    (GrammarKind.STRUCTURAL_TAG, '{"structures": [], "triggers": ["<"]}', "at least one"),
]


@pytest.mark.parametrize(("kind", "source", "reason"), IMPOSSIBLE)
def test_what_cannot_be_is_refused_with_a_reason(kind: GrammarKind, source: str, reason: str, llama: Path) -> None:
    solo = Solo(llama)
    answer = solo.submit((5, 6, 7), under(Grammar(kind=kind, source=source, param="guided_x")))
    solo.run(limit=2_000_000)
    assert answer.failure is not None
    assert (answer.failure.code, answer.failure.param) == ("invalid_request", "guided_x")
    assert answer.failure.message.startswith("guided_x ")
    assert reason in answer.failure.message
    assert not answer.tokens
    solo.check_idle()


def test_long_chains_of_references_do_not_end_the_process(llama: Path) -> None:
    chain = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(1990)}
    schema = {"$ref": "#/$defs/a0", "$defs": chain | {"a1990": {"type": "integer"}}}
    solo = Solo(llama)
    answer = solo.submit((5, 6, 7), under(schema_grammar(schema), max_tokens=8))
    solo.run(limit=2_000_000)
    assert answer.ended


def test_without_a_tokenizer_it_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.make_llama(tmp_path, seed=1)
    (folder / "tokenizer.json").unlink()
    solo = Solo(folder)
    answer = solo.submit((5, 6, 7), under(of(GrammarKind.JSON_OBJECT, "")))
    solo.run()
    assert answer.failure is not None
    assert answer.failure.code == "invalid_request"
    solo.check_idle()


def test_a_flood_of_distinct_schemas_is_bounded(llama: Path) -> None:
    limits = GrammarLimits(max_waiting=40, max_entries=16, max_nbytes=2 << 20)
    solo = Solo(llama, max_waiting_seqs=4096)
    pool = solo.decode.parts.grammars
    assert pool is not None
    pool._limits = limits
    refused, done = 0, 0
    for i in range(300):
        schema = {"type": "object", "properties": {f"p{i}": {"const": i}}, "required": [f"p{i}"]}
        answer = solo.submit((5, 6, 7), under(schema_grammar(schema | {"additionalProperties": False})))
        assert pool.num_waiting <= limits.max_waiting
        if answer.ended:
            assert answer.failure is not None
            assert answer.failure.code == "overloaded"
            refused += 1
        if i % 50 == 49:
            solo.run(limit=1_000_000)
        solo.step()
    solo.run(limit=1_000_000)
    done = sum(a.failure is None for a in solo.answers.by_slot.values())
    assert done + sum(a.failure is not None for a in solo.answers.by_slot.values()) == 300
    assert done >= 40
    assert 0 < len(pool) <= limits.max_entries
    assert pool.kept_nbytes <= limits.max_nbytes
    assert pool.num_waiting == 0
    solo.check_idle()


def test_one_compiled_grammar_serves_all_who_ask_for_it(llama: Path) -> None:
    solo = Solo(llama)
    pool = solo.decode.parts.grammars
    assert pool is not None
    run(solo, [under(schema_grammar(OBJECT), seed=i) for i in range(10)])
    run(solo, [under(schema_grammar(OBJECT), seed=i) for i in range(10)])
    assert pool.num_compiled == 1
    assert pool.num_found == 10


def slow_schema(number: int) -> Grammar:
    properties = {f"property_{i}": {"type": "string"} for i in range(3000 + number)}
    return schema_grammar({"type": "object", "properties": properties})


def test_what_takes_too_long_ends_and_so_do_those_behind_it(llama: Path) -> None:
    solo = Solo(llama)
    pool = solo.decode.parts.grammars
    assert pool is not None
    slow = [solo.submit((5, 6), under(slow_schema(i))) for i in range(2)]
    time.sleep(0.2)  # both threads are at work
    behind = solo.submit((5, 6), under(schema_grammar(OBJECT)))
    bystander = solo.submit((5, 6), greedy(5))
    solo.run(bystander)
    assert not any(a.ended for a in (*slow, behind))
    assert solo.decode.engine.next_deadline <= solo.clock.now() + pool._limits.timeout_s
    solo.clock.advance(pool._limits.timeout_s + 0.01)
    solo.step()
    assert [a.failure.code for a in (*slow, behind) if a.failure] == [
        "invalid_request",
        "invalid_request",
        "overloaded",
    ]
    assert "to compile" in slow[0].failure.message
    solo.check_idle()


def test_requests_end_while_their_grammar_is_compiled(llama: Path) -> None:
    solo = Solo(llama)
    gone = solo.submit((5, 6), under(slow_schema(9), n=2))
    late = solo.submit((5, 6), under(slow_schema(9)), remaining_s=0.5)
    half = solo.submit((5, 6), under(slow_schema(9), n=2, max_tokens=4))
    solo.cancel(half, 0)
    solo.cancel(gone)
    solo.clock.advance(0.6)
    solo.step()
    assert gone.finish == {0: FinishReason.CANCELLED, 1: FinishReason.CANCELLED}
    assert late.failure is not None
    assert late.failure.code == "deadline_exceeded"
    solo.run(limit=5_000_000)
    assert half.failure is None
    assert half.finish[0] is FinishReason.CANCELLED
    assert half.finish[1] is FinishReason.LENGTH
    solo.check_idle()


def test_what_is_kept_is_counted_by_its_sources(llama: Path) -> None:
    solo = Solo(llama)
    pool = solo.decode.parts.grammars
    assert isinstance(pool, GrammarPool)
    grammar = schema_grammar(OBJECT)
    run(solo, [under(grammar)])
    assert pool.kept_nbytes == nbytes_of((grammar.kind.value, grammar.source, "", ""))


def test_the_descriptor_rests_when_there_is_nothing_to_take(llama: Path) -> None:
    """One that stays readable would keep an idle engine's loop awake."""
    solo = Solo(llama)
    pool = solo.decode.parts.grammars
    assert pool is not None
    for i in range(30):
        answer = solo.submit((5, 6), under(of(GrammarKind.CHOICE, f'["a{i}"]')))
        if i % 3 == 0:
            solo.cancel(answer)
        solo.run(answer, limit=1_000_000)
    deadline = time.monotonic() + 10
    while pool._rings_due and time.monotonic() < deadline:
        solo.step()
    assert pool._rings_due == 0
    waiting = select.poll()
    waiting.register(pool.wakeup_fd, select.POLLIN)
    assert waiting.poll(0) == []
    assert pool.num_compiled == 30
    pool.shutdown()
    assert pool._wakeup_fd == -1
    assert not any(thread.is_alive() for thread in pool._threads)
