"""Everything that travels comes back equal, through bytes; what is malformed is refused by field name."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
import rpc_support as s
from codec_support import quick, refused, through_bytes
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidRequestError
from common.rpc import codec
from common.types import (
    MAX_SOURCE_BYTES,
    ChoiceDelta,
    Failure,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenLogprobs,
)
from nanodeploy.v1 import controller_pb2, decode_pb2, prefill_pb2, types_pb2

NOW = 1024.0


@quick
@given(s.workers)
def test_worker_round_trip(worker):
    assert codec.worker_from_proto(through_bytes(codec.worker_to_proto(worker))) == worker


@quick
@given(s.requests(NOW))
def test_request_round_trip(request):
    back = codec.request_from_proto(through_bytes(codec.request_to_proto(request, NOW)), NOW)
    assert back.deadline_s == pytest.approx(request.deadline_s, abs=2e-3)
    assert (back.deadline_s == 0.0) == (request.deadline_s == 0.0)
    fields = {n: getattr(back, n) for n in GenerationRequest.__struct_fields__ if n != "deadline_s"}
    assert GenerationRequest(deadline_s=request.deadline_s, **fields) == request


@quick
@given(st.lists(st.tuples(s.requests(NOW), st.none() | s.refs), max_size=4))
def test_submits_are_what_protobuf_would_write(submits):
    made = [codec.submit_item(request, prefill, NOW) for request, prefill in submits]
    whole = decode_pb2.StreamRequest.FromString(codec.submit_message(made))
    wanted = [
        decode_pb2.SubmitItem(
            request=codec.request_to_proto(request, NOW), prefill=codec.ref_to_proto(prefill) if prefill else None
        )
        for request, prefill in submits
    ]
    assert list(whole.submit.items) == wanted
    assert whole.WhichOneof("message") == "submit"


def test_a_large_submit_is_framed_right():
    request = GenerationRequest(
        request_id="r", model="m", prompt_token_ids=tuple(range(200_000)), sampling=SamplingParams(seed=1)
    )
    whole = decode_pb2.StreamRequest.FromString(codec.submit_message([codec.submit_item(request, None, NOW)] * 2))
    assert [len(item.request.prompt_token_ids) for item in whole.submit.items] == [200_000] * 2


@pytest.mark.parametrize("beyond", [(), (2**18,), (2**32 - 1,)])
def test_prompts_are_packed_right_at_every_length_of_a_varint(beyond):
    edges = [2**bits + off for bits in (7, 14, 17) for off in (-1, 0, 1)]
    ids = (0, 1, *edges, 2**18 - 1, *random.Random(repr(beyond)).choices(range(2**18), k=1000), *beyond)
    request = GenerationRequest(request_id="r", model="m", prompt_token_ids=ids, sampling=SamplingParams(seed=1))
    item = decode_pb2.SubmitItem.FromString(codec.submit_item(request, None, NOW))
    assert tuple(item.request.prompt_token_ids) == ids


@quick
@given(s.stats, s.failures)
def test_stats_and_failure_round_trip(stats, failure):
    assert codec.stats_from_proto(through_bytes(codec.stats_to_proto(stats))) == stats
    assert codec.failure_from_proto(through_bytes(codec.failure_to_proto(failure))) == failure


@quick
@given(
    st.lists(st.tuples(s.u64, s.choice_deltas()), max_size=6),
    st.lists(st.tuples(s.u64, s.failures), max_size=2),
    st.lists(st.tuples(s.u64, s.stats), max_size=2),
    st.lists(st.tuples(s.u64, st.integers(0, 5).flatmap(s.token_logprobs)), max_size=2),
)
def test_deltas_round_trip(rows, failures, stats, prompt_logprobs):
    message = through_bytes(codec.deltas_to_proto(rows, failures, stats, prompt_logprobs))
    found = codec.deltas_from_proto(message)
    assert (list(found.rows), *found[1:]) == (rows, failures, stats, prompt_logprobs)
    plain = (
        row[0] if len(row) == 1 and not (d.finish or d.logprobs or d.vector or d.stop_token_id is not None) else -1
        for d in (delta for _, delta in rows)
        for row in (d.token_ids,)
    )
    assert list(found.rows.singles) == list(plain)


@quick
@given(st.lists(s.workers, max_size=3), s.workers, s.loads, s.u64)
def test_watch_round_trip(workers, worker, load, revision):
    events = [
        codec.Snapshot("abc123", revision, tuple(workers)),
        *(codec.Change(revision, kind, worker, "expired") for kind in codec.ChangeKind),
        codec.Loads((codec.LoadEntry(worker.ref.worker_id, worker.ref.epoch, load),)),
        codec.Ping(revision),
    ]
    for event in events:
        assert codec.watch_event_from_proto(through_bytes(codec.watch_event_to_proto(event))) == event


@quick
@given(st.binary(max_size=200))
def test_random_bytes_never_escape_the_error_tree(raw):
    decoders = [
        (types_pb2.WorkerInfo, codec.worker_from_proto),
        (types_pb2.GenerationRequest, lambda m: codec.request_from_proto(m, NOW)),
        (decode_pb2.StepDeltas, codec.deltas_from_proto),
        (prefill_pb2.KvLayout, codec.layout_from_proto),
        (prefill_pb2.PrefillOrder, lambda m: codec.order_from_proto(m, 1)),
        (controller_pb2.WatchResponse, codec.watch_event_from_proto),
    ]
    for message_type, decode in decoders:
        try:
            message = message_type.FromString(raw)
        except Exception:  # noqa: BLE001 - protobuf's own parse error: gRPC answers that before we see it
            continue
        with contextlib.suppress(InvalidRequestError):
            decode(message)


def valid_request() -> types_pb2.GenerationRequest:
    request = GenerationRequest(
        request_id="r1", model="m", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(seed=5, n=2)
    )
    return codec.request_to_proto(request, NOW)


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("request_id", "", "request_id"),
        ("request_id", "a\nb", "request_id"),
        ("num_choices", 0, "num_choices"),
        ("num_choices", 129, "n"),
        ("model", "x" * 2000, "model"),
        ("cache_salt", "x" * 2000, "cache_salt"),
    ],
)
def test_bad_request_fields(field, value, param):
    request = valid_request()
    setattr(request, field, value)
    refused(param, codec.request_from_proto, request, NOW)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("min_p", 2.0),
        ("max_tokens", 0),
        ("min_tokens", 10**6),
        ("presence_penalty", float("inf")),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
    ],
)
def test_bad_sampling_fields(field, value):
    request = valid_request()
    setattr(request.sampling, field, value)
    refused(field, codec.request_from_proto, request, NOW)


def test_bad_request_columns():
    request = valid_request()
    request.sampling.logit_bias_ids.extend([1, 2])
    request.sampling.logit_bias_values.append(1.0)
    refused("sampling.logit_bias_values", codec.request_from_proto, request, NOW)

    request = valid_request()
    request.prompt_token_ids.append(2**31)
    refused("prompt_token_ids", codec.request_from_proto, request, NOW)
    del request.prompt_token_ids[:]
    refused("prompt_token_ids", codec.request_from_proto, request, NOW)

    request = valid_request()
    request.sent.add(choice=2, token_ids=[1])
    refused("sent.choice", codec.request_from_proto, request, NOW)
    request = valid_request()
    request.sent.add(choice=1, token_ids=[1])
    request.sent.add(choice=1, token_ids=[2])
    refused("sent.choice", codec.request_from_proto, request, NOW)


def test_bad_embeddings():
    def with_embedding(**changes: Any) -> types_pb2.GenerationRequest:
        request = valid_request()
        fields = {"position": 0, "num_tokens": 2, "hidden_size": 8, "media_hash": b"h" * 16} | changes
        fields.setdefault("grid", types_pb2.GridShape(frames=1, height=fields["num_tokens"], width=1))
        owner = types_pb2.WorkerRef(worker_id="enc-0", epoch=1, address="h:1")
        request.embeddings.add(owner=owner, **fields)
        return request

    assert codec.request_from_proto(with_embedding(), NOW).embeddings[0].num_tokens == 2
    refused("embeddings[0].media_hash", codec.request_from_proto, with_embedding(media_hash=b"short"), NOW)
    refused("embeddings[0].num_tokens", codec.request_from_proto, with_embedding(num_tokens=0), NOW)
    refused("embeddings[0]", codec.request_from_proto, with_embedding(num_tokens=4), NOW)
    for wrong in (types_pb2.GridShape(), types_pb2.GridShape(frames=1, height=2, width=2)):
        refused("embeddings[0].grid", codec.request_from_proto, with_embedding(grid=wrong), NOW)
    overlapping = with_embedding()
    overlapping.embeddings.append(overlapping.embeddings[0])
    refused("embeddings[1].position", codec.request_from_proto, overlapping, NOW)


def test_deadlines_are_remaining_time():
    request = GenerationRequest(
        request_id="r", model="m", prompt_token_ids=(1,), sampling=SamplingParams(seed=0), deadline_s=NOW + 1.5
    )
    assert codec.request_to_proto(request, NOW).remaining_ms == 1500
    assert codec.request_to_proto(request, NOW + 1.5).remaining_ms == 1
    assert codec.request_to_proto(request, NOW + 99).remaining_ms == 1
    assert codec.request_from_proto(codec.request_to_proto(request, NOW), 5.0).deadline_s == 6.5


def test_seed_is_needed_and_negative_seeds_wrap():
    with pytest.raises(ValueError, match="seed"):
        codec.sampling_to_proto(SamplingParams())
    assert codec.sampling_to_proto(SamplingParams(seed=-1)).seed == 2**64 - 1


def test_malformed_traceparent_is_ignored():
    request = valid_request()
    request.traceparent = "nonsense"
    assert codec.request_from_proto(request, NOW).traceparent == ""


@pytest.mark.parametrize(
    ("path", "value", "param"),
    [
        ("ref.worker_id", "", "worker.ref.worker_id"),
        ("ref.worker_id", "a b", "worker.ref.worker_id"),
        ("ref.epoch", 0, "worker.ref.epoch"),
        ("ref.address", "nohost", "worker.ref.address"),
        ("ref.address", "host:99999", "worker.ref.address"),
        ("http_address", ":80", "worker.http_address"),
        ("role", 0, "worker.role"),
        ("role", 77, "worker.role"),
        ("state", 0, "worker.state"),
        ("model.name", "", "worker.model.name"),
        ("model.model_hash", b"123", "worker.model.model_hash"),
        ("layout_fingerprint", b"123", "worker.layout_fingerprint"),
        ("load.tokens_per_s", float("nan"), "worker.load.tokens_per_s"),
    ],
)
def test_bad_worker_fields(path, value, param):
    message = codec.worker_to_proto(s.make_worker())
    target: Any = message
    *parents, leaf = path.split(".")
    for parent in parents:
        target = getattr(target, parent)
    setattr(target, leaf, value)
    refused(param, codec.worker_from_proto, message)


def test_bad_delta_columns():
    def rows() -> decode_pb2.StepDeltas:
        logprobs = TokenLogprobs((-0.5, -1.0), 1, (7, 8), (-0.5, -1.0))
        delta = ChoiceDelta(choice=0, position=4, token_ids=(7, 9), finish=FinishReason.STOP, logprobs=logprobs)
        return codec.deltas_to_proto([(1, delta), (2, ChoiceDelta(choice=1, position=0, token_ids=(3,)))])

    for column in ("choices", "positions", "num_tokens", "finish_reasons", "stop_token_ids"):
        message = rows()
        del getattr(message, column)[-1]
        refused(f"deltas.{column}", codec.deltas_from_proto, message)
    message = rows()
    message.token_ids.append(1)
    refused("deltas.token_ids", codec.deltas_from_proto, message)
    message = rows()
    message.finish_reasons[0] = 99
    refused("deltas.finish_reasons", codec.deltas_from_proto, message)
    message = rows()
    message.logprobs[0].row = 2
    refused("deltas.logprobs.row", codec.deltas_from_proto, message)
    message = rows()
    del message.logprobs[0].token_logprobs[0]
    refused("deltas.logprobs.token_logprobs", codec.deltas_from_proto, message)
    message = rows()
    message.logprobs[0].top_n = 2
    refused("deltas.logprobs.top_token_ids", codec.deltas_from_proto, message)
    for row, values, field in ((2, bytes(8), "row"), (1, bytes(8), "row"), (0, b"", "values"), (0, bytes(6), "values")):
        message = rows()
        message.vectors.add(row=row, values=values)
        refused(f"deltas.vectors.{field}", codec.deltas_from_proto, message)
    message = rows()
    for _ in range(2):
        message.vectors.add(row=0, values=bytes(8))
    refused("deltas.vectors.row", codec.deltas_from_proto, message)


def test_unknown_error_codes_stay_failures():
    assert codec.failure_from_proto(types_pb2.RequestError(code=0, message="x")).code == "internal"
    assert codec.failure_from_proto(types_pb2.RequestError(code=55, message="x")).code == "internal"
    assert codec.failure_to_proto(Failure("config", "x")).code == types_pb2.ERROR_CODE_INTERNAL
    assert len(codec.failure_to_proto(Failure("internal", "x" * 9000)).message) == 1024


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (types_pb2.GRAMMAR_KIND_JSON_OBJECT, "{}"),
        (types_pb2.GRAMMAR_KIND_JSON_SCHEMA, ""),
        (types_pb2.GRAMMAR_KIND_JSON_SCHEMA, "{"),
        (types_pb2.GRAMMAR_KIND_JSON_SCHEMA, "[" * 100_000),
        (types_pb2.GRAMMAR_KIND_JSON_SCHEMA, "3"),
        (types_pb2.GRAMMAR_KIND_CHOICE, "[]"),
        (types_pb2.GRAMMAR_KIND_CHOICE, '["a", 1]'),
        (types_pb2.GRAMMAR_KIND_STRUCTURAL_TAG, "[]"),
        (types_pb2.GRAMMAR_KIND_REGEX, " "),
        (types_pb2.GRAMMAR_KIND_REGEX, "a" * (MAX_SOURCE_BYTES + 1)),
        (types_pb2.GRAMMAR_KIND_GRAMMAR, "é" * (MAX_SOURCE_BYTES // 2 + 1)),
    ],
)
def test_grammars_of_the_wrong_form_name_the_clients_field(kind, source):
    wire = types_pb2.Grammar(kind=kind, source=source, param="guided_json")
    refused("guided_json", codec.request.grammar_from_proto, wire)


def test_a_grammar_without_a_kind_is_refused():
    refused("grammar.kind", codec.request.grammar_from_proto, types_pb2.Grammar(source="a"))
