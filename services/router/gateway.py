"""The OpenAI endpoints: from bytes to a run. Each handler takes one exchange.

parse -> find the model and its tokenizer -> job -> run -> answer, log, count
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError

from common.config.schema import RouterConfig
from common.errors import (
    InvalidRequestError,
    NanoDeployError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
    UnsupportedError,
)
from common.telemetry import get_logger
from common.types import Clock, GenerationRequest, ModelInfo, Role, WorkerInfo
from services.router import replies
from services.router.admission.callers import Callers
from services.router.admission.limiter import Ledger, Limiter, headers
from services.router.admission.places import Place, Places, cost_of
from services.router.admission.sizes import TIMEOUT_HEADER, check_sizes, time_limit_s
from services.router.console.recent import Recent
from services.router.errors import idle_fields, validation_error
from services.router.exchange import Exchange
from services.router.metrics import ModelMetrics, RouterMetrics
from services.router.models import ModelText, ModelTexts
from services.router.params import Job, chat_ids, chat_job, completion_job, conversation_ids
from services.router.relay import Relay
from services.router.replies import Head, Usage
from services.router.routing.board import Hints, Members, serves
from services.router.run import Run
from services.router.schemas import ChatBody, CompletionBody, DetokenizeBody, SamplingFields, TokenizeBody
from services.router.style import ChatStyle, CompletionStyle, Style

B = TypeVar("B", bound=BaseModel)
S = TypeVar("S", bound=SamplingFields)
MakeJob = Callable[[S, ModelInfo, ModelText, ModelTexts, random.Random], Awaitable[Job]]

TIMINGS_HEADER: Final = b"x-nanodeploy-timings"
EXPLAIN_HEADER: Final = b"x-nanodeploy-explain"
SEPARATION_HEADER: Final = b"x-nanodeploy-separation"
SESSION_HEADER: Final = b"x-session-id"
CHAT: Final = ChatStyle()
COMPLETION: Final = CompletionStyle()

_log = get_logger(__name__)


@functools.lru_cache(maxsize=256)
def fingerprint(model_hash: bytes, dtype: str) -> str:
    """Changes when weights or their dtype do."""
    return "fp_" + hashlib.blake2b(model_hash + dtype.encode(), digest_size=5).hexdigest()


def _checked(kind: type[B], raw: bytes) -> B:
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        idle = idle_fields(error)
        if not idle:
            raise
    return kind.model_validate_json(json.dumps({k: v for k, v in json.loads(raw).items() if k not in idle}))


class Gateway:
    """What the endpoints share. Owns the models' texts; members and relay are lent."""

    def __init__(
        self,
        config: RouterConfig,
        members: Members,
        relay: Relay,
        *,
        metrics: RouterMetrics,
        clock: Clock,
        rng: random.Random,
        ledger: Ledger | None = None,
        router_id: str = "",
    ) -> None:
        self.members = members
        self.relay = relay
        self.metrics = metrics
        self.texts = ModelTexts(config)
        self.places = Places(config, self, clock)
        self.callers = Callers(config.api_keys, admin_token=config.admin_token, required=config.require_api_key)
        self.limiter = Limiter(self.callers, ledger, router_id, clock)
        self.recent = Recent()
        self.in_flight = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._config = config
        self._clock = clock
        self._rng = rng

    # -- models --

    def decode_workers(self) -> list[WorkerInfo]:
        return [worker for worker in self.members.workers.values() if worker.role is Role.DECODE]

    def models(self) -> dict[str, ModelInfo]:
        """Every name that a model answers to."""
        found: dict[str, ModelInfo] = {}
        for worker in self.decode_workers():
            for name in (worker.model.name, *worker.model.served_names):
                found.setdefault(name, worker.model)
        return found

    def resolve(self, name: str | None) -> tuple[str, ModelInfo]:
        """The model asked for, or the only one. `UnavailableError` while none is known, else `NotFoundError`."""
        decode = self.decode_workers()
        if not decode:
            raise UnavailableError("No model is served at the moment: no decode worker is there.")
        if name is None:
            names = {worker.model.name for worker in decode}
            if len(names) > 1:
                raise InvalidRequestError(f"model is required: one of {', '.join(sorted(names))}", param="model")
            return decode[0].model.name, decode[0].model
        for worker in decode:
            if serves(worker, name):
                return name, worker.model
        raise NotFoundError(f"The model `{name}` does not exist.", param="model")

    def capabilities(self, model: ModelInfo) -> dict[str, bool]:
        """What can be asked of a model; those of its text are known once its tokenizer has been read."""
        text, embeds = self.texts.peek(model), model.embedding_size > 0
        chat = text is not None and text.template is not None and not embeds
        return {
            "completions": not embeds,
            "chat": chat,
            "responses": chat,
            "messages": chat,
            "tool_calls": chat and text is not None and text.calls is not None,
            "reasoning": chat and text is not None and text.reasoning is not None,
            "embeddings": embeds,
        }

    async def body(self, exchange: Exchange, kind: type[B]) -> B:
        raw = await exchange.body(self._config.max_body_bytes)
        try:
            return _checked(kind, raw)
        except ValidationError as error:
            raise validation_error(error) from None

    # -- generation --

    async def chat(self, exchange: Exchange) -> None:
        await self._generate(exchange, ChatBody, chat_job, CHAT)

    async def completions(self, exchange: Exchange) -> None:
        await self._generate(exchange, CompletionBody, completion_job, COMPLETION)

    async def _generate(self, exchange: Exchange, kind: type[S], make_job: MakeJob[S], style: Style) -> None:
        self._enter()
        try:
            started_s = self._clock.now()
            await self.serve(exchange, await self.body(exchange, kind), make_job, style, started_s)
        finally:
            self._leave()

    async def serve(
        self, exchange: Exchange, body: S, make_job: MakeJob[S], style: Style, started_s: float, *, pools: bool = False
    ) -> None:
        """Answer a checked body in a style. Every generation of every API comes through here, `admitted`.

        `pools`: vectors are asked for, not text.
        """
        if body.stream_options is not None and not body.stream:
            raise InvalidRequestError("stream_options is allowed with stream only", param="stream_options")
        check_sizes(body, self._config)
        limit_s = time_limit_s(body, exchange.header(TIMEOUT_HEADER), self._config.request_timeout_s)
        deadline_s = started_s + limit_s
        name, model = self.resolve(body.model)
        if pools != (model.embedding_size > 0):
            has = "generates text and has no embeddings" if pools else "has embeddings and generates no text"
            raise UnsupportedError(f"The model `{name}` {has}.", param="model")
        metrics = self.metrics.of(model.name)
        metrics.running.inc()
        try:
            place = self._place(exchange, model.name, body.priority, deadline_s)
            text = self.texts.peek(model) or await self.texts.get(model)
            job = await make_job(body, model, text, self.texts, self._rng)
            metrics.tokenize.observe(self._clock.now() - started_s)
            run = self._make_run(exchange, body, name, model, text, job, style, started_s, deadline_s)
            taken = await self._charge(exchange, job)
            try:
                if not place.enter(job):
                    await place.wait()
                try:
                    await self._answer(exchange, body, run, deadline_s)
                finally:
                    place.leave()
            finally:
                usage = run.usage()
                spent = usage.prompt_tokens + usage.completion_tokens if run.first_token_s else 0
                self.limiter.settle(exchange.caller, taken, spent)
            self._account(exchange, run, usage, metrics, model.name, started_s)
        except NanoDeployError as error:
            metrics.failed(error.code)
            self.recent.failed(exchange, model.name, error.code, self._clock.now() - started_s)
            raise
        finally:
            metrics.running.inc(-1)

    def _place(self, exchange: Exchange, model: str, priority: int, deadline_s: float) -> Place:
        """What has no prospect is said before the prompt is tokenised."""
        caller = exchange.caller
        self.limiter.check(caller)
        gate, priority = self.places.gate(model), caller.lowered(priority)
        gate.check(caller.key_id, 1, priority, deadline_s)
        return Place(gate, exchange, caller.key_id, priority, deadline_s, self._clock)

    async def _charge(self, exchange: Exchange, job: Job) -> int:
        caller = exchange.caller
        if caller.meters is None:
            return 0
        taken = await self.limiter.charge(caller, sum(map(len, job.prompts)), cost_of(job))
        exchange.headers += headers(caller.meters)
        return taken

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        if self.draining:
            raise UnavailableError("the router is stopping")
        if self.in_flight >= self._config.max_concurrent_requests:
            raise OverloadedError(f"{self.in_flight} requests are in flight, which is this router's limit")
        self.in_flight += 1
        self._idle.clear()

    def _leave(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    def _make_run(
        self,
        exchange: Exchange,
        body: SamplingFields,
        name: str,
        model: ModelInfo,
        text: ModelText,
        job: Job,
        style: Style,
        started_s: float,
        deadline_s: float,
    ) -> Run:
        number, caller = self._rng.getrandbits(127), exchange.caller
        salt, priority = caller.salt(body.cache_salt or ""), caller.lowered(body.priority)
        requests = [
            GenerationRequest(
                request_id=f"{number + index:032x}",
                model=model.name,
                prompt_token_ids=tuple(ids),
                sampling=job.sampling,
                cache_salt=salt,
                priority=priority,
                deadline_s=deadline_s,
                traceparent=exchange.traceparent,
                pooling=job.pooling,
            )
            for index, ids in enumerate(job.prompts)
        ]
        head = Head(f"{style.prefix}{number:032x}", int(time.time()), name, fingerprint(model.model_hash, model.dtype))
        metrics = self.metrics.of(model.name)
        session = exchange.header(SESSION_HEADER) or body.prompt_cache_key or body.user or ""
        return Run(
            job,
            requests,
            text.tokenizer,
            head,
            style=style,
            clock=self._clock,
            started_s=started_s,
            metrics=metrics,
            hints=Hints(
                session,
                exchange.header(EXPLAIN_HEADER) == "1",
                exchange.header(SEPARATION_HEADER) == "always",
            ),
        )

    async def _answer(self, exchange: Exchange, body: SamplingFields, run: Run, deadline_s: float) -> None:
        timings = exchange.header(TIMINGS_HEADER) == "1"
        if not body.stream:
            await run.answer_whole(self.relay, exchange, deadline_s, timings=timings)
            return
        options = body.stream_options
        await run.answer_stream(
            self.relay,
            exchange,
            deadline_s,
            limit_tokens=self._config.stream_buffer_tokens,
            include_usage=options is not None and options.include_usage,
            continuous_usage=options is not None and options.continuous_usage_stats,
            timings=timings,
        )

    def _account(
        self, exchange: Exchange, run: Run, usage: Usage, metrics: ModelMetrics, model: str, started_s: float
    ) -> None:
        """Count an answered request and log where its time went."""
        seconds = self._clock.now() - started_s
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.cached_tokens.inc(usage.cached_tokens)
        metrics.generation_tokens.inc(usage.completion_tokens)
        metrics.request_prompt.observe(usage.prompt_tokens)
        metrics.request_output.observe(usage.completion_tokens)
        metrics.e2e.observe(seconds)
        exchange.usage = usage
        self.recent.answered(exchange, run, model, started_s, seconds)
        for finish in run.finishes:
            metrics.ended(finish)
        first = run.stats[0]
        _log.info(
            "request answered",
            model=model,
            id=run.head.id,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            first_token_ms=round(1000 * (run.first_token_s - started_s), 2),
            total_ms=round(1000 * seconds, 2),
            finish=run.finishes,
            waterfall=None if first is None else msgspec.to_builtins(first),
        )

    # -- text --

    async def tokenize(self, exchange: Exchange) -> None:
        body = await self.body(exchange, TokenizeBody)
        _, model = self.resolve(body.model)
        text = await self.texts.get(model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("give either prompt or messages", param="prompt")
        if body.messages is not None:
            ids = await chat_ids(
                body.messages,
                model,
                text,
                self.texts,
                add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
                continue_final_message=body.continue_final_message,
                add_special_tokens=bool(body.add_special_tokens),
                tools=body.tools,
                variables=body.chat_template_kwargs or {},
                whole=False,
            )
        else:
            prompt, special = body.prompt or "", body.add_special_tokens is not False
            encode = text.tokenizer.encode
            ids = await self.texts.run(lambda: encode(prompt, add_special_tokens=special), len(prompt))
        strings = [text.tokenizer.token_string(i) for i in ids] if body.return_token_strs else None
        answer = {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids, "token_strs": strings}
        await exchange.answer(200, replies.dumps(answer))

    async def detokenize(self, exchange: Exchange) -> None:
        body = await self.body(exchange, DetokenizeBody)
        _, model = self.resolve(body.model)
        text = await self.texts.get(model)
        wrong = next((i for i in body.tokens if i >= (model.vocab_size or 2**31)), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"tokens has token id {wrong}, the vocabulary ends at {model.vocab_size}", param="tokens"
            )
        decode = text.tokenizer.decode
        prompt = await self.texts.run(lambda: decode(body.tokens, skip_special_tokens=False), len(body.tokens))
        await exchange.answer(200, replies.dumps({"prompt": prompt}))

    async def prompt_ids(self, body: ChatBody) -> list[int]:
        """Of a conversation as it would be answered; longer than the model allows is no error here."""
        _, model = self.resolve(body.model)
        text = await self.texts.get(model)
        return await conversation_ids(body, model, text, self.texts)

    # -- life --

    async def drain(self, grace_s: float) -> None:
        """Take no new requests and let those running finish, for at most `grace_s`."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
