"""From a checked body to what is sent to a worker: prompt ids and `SamplingParams`.

Rules that need the model are here: its length, its vocabulary, its checkpoint's sampling defaults. Errors are
`InvalidRequestError` naming the field of the body.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final, TypeVar, cast

import msgspec

from common.errors import InvalidRequestError, UnsupportedError
from common.text.parsers import ParserPlan
from common.types import Grammar, ModelInfo, Pooling, SamplingParams
from services.router.errors import ContextLengthError
from services.router.grammars import behind_reasoning, grammar_of
from services.router.models import ModelText, ModelTexts
from services.router.schemas import ChatBody, CompletionBody, Messages, SamplingFields
from services.router.tools import ToolUse, call_format, parser_plan, reasoning_start, tool_use, with_calls

T = TypeVar("T")

COMPLETION_MAX_TOKENS: Final = 16
MAX_STOP_CHARS: Final = 2048  # of all stop strings: their automaton is built per request
MAX_SEQUENCES: Final = 1024  # prompts x n of one request
_CHOSEN: Final = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
)


class Job(msgspec.Struct, frozen=True):
    """One HTTP request, checked: `prompts` x `sampling.n` choices."""

    prompts: list[list[int]]
    sampling: SamplingParams
    echo: bool = False
    echo_only: bool = False  # max_tokens 0: the prompt alone is wanted
    prompt_texts: tuple[str, ...] = ()  # as given, for echo; empty: decode the ids
    prompt_logprobs: int | None = None  # alternatives of each prompt token that the answer shows
    parsing: ParserPlan | None = None  # of the answers; None: they are content as they are
    pooling: Pooling | None = None  # the prompts' vectors are wanted, and no text


async def chat_job(body: ChatBody, model: ModelInfo, text: ModelText, texts: ModelTexts, rng: random.Random) -> Job:
    if body.messages is None or not body.messages:
        raise InvalidRequestError("messages must not be empty", param="messages")
    use = tool_use(body)
    calls = call_format(use, text)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= 20:
        raise InvalidRequestError(
            f"top_logprobs must be between 0 and 20, got {body.top_logprobs}", param="top_logprobs"
        )
    _check_prompt_logprobs(body)
    ids = await _conversation_ids(body, use, model, text, texts, whole=body.truncate_prompt_tokens is None)
    name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    own = text.tokenizer.end_id <= model.vocab_size
    prompts = [_fit(ids, body, model, wanted, "messages", name, own=own)]
    left = model.max_model_len - len(prompts[0])
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_params(
        body,
        text,
        rng,
        max_tokens=left if wanted is None else wanted,
        max_tokens_name=name,
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        grammar=behind_reasoning(grammar_of(body), text.reasoning, reasoning_start(body, text, prompts[0])),
    )
    _check_ids(sampling, model)
    parsing = parser_plan(body, use, text, prompts[0], calls)
    sampling = with_calls(sampling, use, parsing)
    return Job(prompts, sampling, prompt_logprobs=body.prompt_logprobs, parsing=parsing)


async def conversation_ids(body: ChatBody, model: ModelInfo, text: ModelText, texts: ModelTexts) -> list[int]:
    """The prompt of a conversation, however long it is."""
    return await _conversation_ids(body, tool_use(body), model, text, texts, whole=False)


async def _conversation_ids(
    body: ChatBody, use: ToolUse, model: ModelInfo, text: ModelText, texts: ModelTexts, *, whole: bool
) -> list[int]:
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    return await chat_ids(
        body.messages,
        model,
        text,
        texts,
        add_generation_prompt=body.add_generation_prompt and not _continues(body),
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens,
        tools=use.shown,
        variables=variables,
        whole=whole,
    )


def _check_prompt_logprobs(body: SamplingFields) -> None:
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequestError("prompt_logprobs is not possible with stream", param="prompt_logprobs")


def _continues(body: ChatBody) -> bool:
    """OpenAI has no add_generation_prompt, so its default must not collide with continue_final_message."""
    return body.continue_final_message and "add_generation_prompt" not in body.model_fields_set


async def chat_ids(
    messages: Messages,
    model: ModelInfo,
    text: ModelText,
    texts: ModelTexts,
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    add_special_tokens: bool,
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any],
    whole: bool = True,
) -> list[int]:
    """Prompt ids of a conversation. `whole` refuses, before encoding, what cannot fit the model."""
    template = text.require_template()
    size = sum(len(str(message.get("content") or "")) for message in messages if isinstance(message, dict))

    def work() -> list[int]:
        prompt = template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=variables,
        )
        return _encode(prompt, model, text, "messages", add_special_tokens=add_special_tokens, whole=whole)

    return await texts.run(work, size + 512 * len(tools or ()))


async def completion_job(
    body: CompletionBody, model: ModelInfo, text: ModelText, texts: ModelTexts, rng: random.Random
) -> Job:
    if body.suffix:
        raise UnsupportedError("suffix is not supported", param="suffix")
    if body.best_of not in (None, 1):
        raise UnsupportedError("best_of is not supported: use n", param="best_of")
    _check_prompt_logprobs(body)
    echo = bool(body.echo)
    echo_only = echo and body.max_tokens == 0
    wanted = 1 if echo_only else body.max_tokens
    given = await _completion_prompts(body, model, text, texts)
    prompts = [_fit(ids, body, model, wanted, place, "max_tokens") for ids, place in _placed(given, "prompt")]
    if wanted is None:
        wanted = min(COMPLETION_MAX_TOKENS, *(model.max_model_len - len(ids) for ids in prompts))
    tops = [top for top in (body.logprobs if echo else None, body.prompt_logprobs) if top is not None]
    sampling = sampling_params(
        body,
        text,
        rng,
        max_tokens=wanted,
        logprobs=body.logprobs,
        prompt_logprobs=max(tops, default=None),
        grammar=None if echo_only else grammar_of(body),
    )
    _check_ids(sampling, model)
    if len(prompts) * sampling.n > MAX_SEQUENCES:
        raise InvalidRequestError(f"prompts times n must be at most {MAX_SEQUENCES}", param="n")
    whole = echo and body.truncate_prompt_tokens is None
    strings = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    prompt_texts = tuple(p for p in strings if isinstance(p, str)) if whole else ()
    shown = body.prompt_logprobs
    return Job(prompts, sampling, echo=echo, echo_only=echo_only, prompt_texts=prompt_texts, prompt_logprobs=shown)


async def embedding_job(
    body: CompletionBody, model: ModelInfo, text: ModelText, texts: ModelTexts, pooling: Pooling
) -> Job:
    """`body.prompt` is the request's `input`. Nothing is sampled."""
    given = await _completion_prompts(body, model, text, texts, "input")
    prompts = [_fit(ids, body, model, None, place, "input", room=0) for ids, place in _placed(given, "input")]
    if len(prompts) > MAX_SEQUENCES:
        raise InvalidRequestError(f"input must have at most {MAX_SEQUENCES} entries", param="input")
    if pooling.dimensions > model.embedding_size:
        raise InvalidRequestError(
            f"dimensions must be at most {model.embedding_size}, got {pooling.dimensions}", param="dimensions"
        )
    return Job(prompts, SamplingParams(max_tokens=1, seed=0), pooling=pooling)


async def _completion_prompts(
    body: CompletionBody, model: ModelInfo, text: ModelText, texts: ModelTexts, param: str = "prompt"
) -> list[list[int]]:
    """A string, strings, token ids or lists of token ids, each as a list of ids."""
    prompt = body.prompt
    if isinstance(prompt, str):
        prompt = [prompt]
    if not prompt:
        raise InvalidRequestError(f"{param} must not be empty", param=param)
    if isinstance(prompt[0], int):  # all are, and there may be many
        return [prompt]
    strings = [p for p in prompt if isinstance(p, str)]
    if strings:
        whole = body.truncate_prompt_tokens is None
        special = body.add_special_tokens

        def work() -> list[list[int]]:
            return [
                _encode(s, model, text, place, add_special_tokens=special, whole=whole)
                for s, place in _placed(strings, param)
            ]

        return await texts.run(work, sum(len(s) for s in strings))
    return cast("list[list[int]]", prompt)


def _placed(prompts: Sequence[T], param: str) -> list[tuple[T, str]]:
    """Each with what errors call it."""
    return [(prompt, param if len(prompts) == 1 else f"{param}[{i}]") for i, prompt in enumerate(prompts)]


def _encode(
    prompt: str, model: ModelInfo, text: ModelText, param: str, *, add_special_tokens: bool, whole: bool
) -> list[int]:
    fewest = text.tokenizer.fewest_tokens(prompt)
    if whole and fewest > model.max_model_len:
        raise too_long(model, f"at least {fewest}", param)
    return text.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)


def too_long(model: ModelInfo, num_tokens: str, param: str) -> ContextLengthError:
    which = param if "[" in param else "the prompt"
    return ContextLengthError(
        f"This model's maximum context length is {model.max_model_len} tokens, "
        f"but {which} has {num_tokens} tokens. Please shorten it.",
        param=param,
    )


def _fit(
    ids: list[int],
    body: SamplingFields,
    model: ModelInfo,
    max_tokens: int | None,
    param: str,
    max_name: str,
    *,
    own: bool = False,
    room: int = 1,
) -> list[int]:
    """The prompt, cut from the left if asked; checked against the model's length and vocabulary.

    `own`: the ids are a tokenizer's whose ids the model knows. `room`: output tokens that must fit behind it.
    """
    limit = model.max_model_len
    keep = body.truncate_prompt_tokens
    if keep is not None:
        if keep != -1 and not 1 <= keep <= limit:
            raise InvalidRequestError(
                f"truncate_prompt_tokens must be -1 or between 1 and {limit}, got {keep}",
                param="truncate_prompt_tokens",
            )
        ids = ids[-(max(limit - max(max_tokens or room, room), 1) if keep == -1 else keep) :]
    if not ids:
        raise InvalidRequestError(f"{param} has no tokens", param=param)
    if len(ids) + room > limit:
        raise too_long(model, str(len(ids)), param)
    if max_tokens is not None and len(ids) + max_tokens > limit:
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens, but {len(ids) + max_tokens} were requested: "
            f"{len(ids)} in the prompt and {max_tokens} of {max_name}. Please shorten one of them.",
            param=max_name,
        )
    if not own and model.vocab_size and not 0 <= min(ids) <= max(ids) < model.vocab_size:
        wrong = next(i for i in ids if not 0 <= i < model.vocab_size)
        raise InvalidRequestError(
            f"{param} has token id {wrong}, the vocabulary ends at {model.vocab_size}", param=param
        )
    return ids


def sampling_params(
    body: SamplingFields,
    text: ModelText,
    rng: random.Random,
    *,
    max_tokens: int,
    max_tokens_name: str = "max_tokens",
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """Ranges are checked by `SamplingParams`. A seed is drawn if none was given."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if sum(map(len, stop)) > MAX_STOP_CHARS:
        raise InvalidRequestError(f"stop must be at most {MAX_STOP_CHARS} characters in all", param="stop")
    chosen = dict(text.defaults)
    for name in _CHOSEN & body.model_fields_set:
        if (value := getattr(body, name)) is not None:
            chosen[name] = value
    try:
        return SamplingParams(
            **chosen,
            n=1 if body.n is None else body.n,
            max_tokens=max_tokens,
            min_tokens=body.min_tokens or 0,
            stop=stop,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            include_stop_str_in_output=body.include_stop_str_in_output,
            ignore_eos=body.ignore_eos,
            seed=rng.getrandbits(64) if body.seed is None else body.seed,
            logit_bias=_logit_bias(body.logit_bias) if body.logit_bias else (),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=body.skip_special_tokens,
            grammar=grammar,
        )
    except InvalidRequestError as error:
        if error.param == "max_tokens" != max_tokens_name:
            raise InvalidRequestError(f"{max_tokens_name}{error.message[10:]}", param=max_tokens_name) from error
        raise


def _logit_bias(bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for key in bias:
        if not (key.isascii() and key.isdigit()):
            raise InvalidRequestError(f"logit_bias has key {key[:40]!r}, which is not a token id", param="logit_bias")
    return tuple((int(key), value) for key, value in bias.items())


def _check_ids(sampling: SamplingParams, model: ModelInfo) -> None:
    if not sampling.stop_token_ids and not sampling.logit_bias:
        return
    named = (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", [token for token, _ in sampling.logit_bias]))
    for name, ids in named:
        for token in ids:
            if not 0 <= token < (model.vocab_size or 2**31):
                raise _outside_vocabulary(name, token, model)


def _outside_vocabulary(param: str, token: int, model: ModelInfo) -> InvalidRequestError:
    return InvalidRequestError(f"{param} has token id {token}, the vocabulary ends at {model.vocab_size}", param=param)
