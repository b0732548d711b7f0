"""Bodies of the APIs beside chat and completions. As there: strict types, and an unknown field is an error."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from services.router.schemas import Body, Prompts

_OBJECT: dict[str, Any] = {"type": "object"}

Items = Annotated[list[Any], WithJsonSchema({"type": "array", "items": _OBJECT, "minItems": 1})]
Blocks = Annotated[list[Any], WithJsonSchema({"type": "array", "items": _OBJECT})]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31, description="smaller runs first")]


# -- /v1/responses -----------------------------------------------------------------------------------


class Reasoning(Body):
    effort: str | None = Field(None, description="a variable for the chat template")
    summary: str | None = Field(None, description="accepted: reasoning is shown as it is")
    generate_summary: str | None = Field(None, description="accepted, not used")


class TextConfig(Body):
    format: dict[str, Any] | None = Field(None, description="text, json_object or json_schema")
    verbosity: str | None = Field(None, description="accepted, not used")


class ResponseStreamOptions(Body):
    include_obfuscation: bool = Field(False, description="accepted; events are not padded")


class ResponsesBody(Body):
    model: str | None = None
    input: str | Items | None = Field(None, description="a text or items")
    instructions: str | None = Field(None, description="a system message, not carried on to the next response")
    previous_response_id: str | None = Field(None, description="go on from a stored response")
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = Field(None, description="default true: kept for router.response_ttl_s")
    background: bool | None = Field(None, description="answer at once with the id, to be asked for later")
    tools: list[dict[str, Any]] | None = Field(None, description="functions")
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = Field(None, description="accepted: tools run at the client's")
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = Field(None, description="auto cuts the prompt's start to fit")
    include: list[str] | None = Field(None, description="message.output_text.logprobs; others are accepted")
    metadata: dict[str, str] | None = None
    user: str | None = Field(None, description="requests of one user may go to one worker: see router.policy")
    service_tier: str | None = Field(None, description="accepted, not used")
    safety_identifier: str | None = Field(None, description="accepted, not used")
    prompt_cache_key: str | None = Field(None, description="as user, and before it; prefixes are cached by content")
    prompt_cache_retention: str | None = Field(None, description="accepted, not used")
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repetition_penalty: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: Priority = 0


# -- /v1/messages ------------------------------------------------------------------------------------


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, description="accepted, not used")
    display: str | None = Field(None, description="accepted: thinking is shown as it is")


class OutputConfig(Body):
    effort: str | None = Field(None, description="a variable for the chat template")
    format: dict[str, Any] | None = Field(None, description="json_schema")


class Turn(Body):
    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class Prompt(Body):
    """What `/v1/messages` and its token count share."""

    model: str | None = None
    messages: list[Turn] = Field(min_length=1)
    system: str | Blocks | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = Field(None, description="auto, any, tool or none")
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = Field(None, description="accepted: prefixes are cached by content")
    context_management: dict[str, Any] | None = Field(None, description="accepted: all that is sent is read")


class MessagesBody(Prompt):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = Field(None, description="accepted, not used")
    service_tier: str | None = Field(None, description="accepted, not used")
    inference_geo: str | None = Field(None, description="accepted, not used")
    thread: dict[str, Any] | None = Field(None, description="not supported: clients are told to send it all")
    seed: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: Priority = 0


class CountBody(Prompt):
    pass


# -- /v1/embeddings, /v1/batches ---------------------------------------------------------------------


class EmbeddingsBody(Body):
    model: str | None = None
    input: Prompts = Field(description="texts or lists of token ids, or one")
    dimensions: int | None = Field(None, ge=1, description="first elements of the vectors; by default all")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: float32, little-endian")
    user: str | None = Field(None, description="requests of one user may go to one worker: see router.policy")
    truncate_prompt_tokens: int | None = Field(None, description="keep the last so many tokens; -1 what fits")
    add_special_tokens: bool = Field(True, description="to texts, as the checkpoint's tokenizer adds them")
    cache_salt: str | None = None
    priority: Priority = 0
    timeout: float | None = Field(None, description="seconds the answer may take; also the header x-request-timeout")


class ExpiresAfter(Body):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class BatchBody(Body):
    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
    completion_window: str = Field(description="a number of hours, as in 24h")
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None
