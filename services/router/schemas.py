"""Request bodies: OpenAI's fields, and vLLM's where OpenAI has none.

Types are strict and unknown fields are errors, so a typo is a 400 and not a silently other result. Ranges are
checked in one place, `SamplingParams`. The models also make the OpenAPI document; answers are written by
`services.router.replies` without them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

# Each kind stops at its first mistake: otherwise thousands of ids are as many errors of every other kind.
Prompts = (
    str
    | Annotated[list[str], Field(fail_fast=True)]
    | Annotated[list[int], Field(fail_fast=True)]
    | Annotated[list[list[int]], Field(fail_fast=True)]
)

_MESSAGE_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool", "function"]},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                            "required": ["type", "text"],
                        },
                    },
                    {"type": "null"},
                ]
            },
            "name": {"type": "string"},
            "tool_calls": {"type": "array", "items": {"type": "object"}},
            "tool_call_id": {"type": "string"},
        },
    },
}

Messages = Annotated[list[Any], WithJsonSchema(_MESSAGE_SCHEMA)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Body):
    include_usage: bool = Field(False, description="a last chunk with the usage of the whole request")
    continuous_usage_stats: bool = Field(False, description="usage so far in every chunk")
    include_obfuscation: bool = Field(False, description="accepted; chunks are not padded")


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class NamedSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema", description="left out: any JSON object")
    strict: bool | None = Field(None, description="accepted: an answer always follows the schema")


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StructuralTagFormat(Body):
    """Free text in which tags begin parts of a given form: `structures` and `triggers`, or a `format`."""

    type: Literal["structural_tag"]
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat, Field(discriminator="type")
]


class StructuredOutputs(Body):
    """vLLM's: one of json, regex, choice, grammar, json_object and structural_tag."""

    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = Field(None, description="context-free, in Lark's or GBNF's form")
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False


class SamplingFields(Body):
    """What both generation endpoints share."""

    model: str | None = Field(None, description="may be left out when one model is served")
    temperature: float | None = Field(None, description="0 is greedy; default of the checkpoint, else 1")
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1 keeps all tokens")
    min_p: float | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="token id -> added to its logit, -100 to 100")
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = Field(None, description="alternatives per prompt token, 0 to 20; not with stream")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = Field(None, description="as structured_outputs.json")
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = Field(None, description="as structured_outputs.whitespace_pattern")
    guided_decoding_backend: str | None = Field(None, description="accepted, not used")
    regex: str | None = Field(None, description="SGLang's: as structured_outputs.regex")
    ebnf: str | None = Field(None, description="SGLang's: as structured_outputs.grammar")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = Field(None, description="keep the last so many prompt tokens; -1 what fits")
    cache_salt: str | None = Field(None, description="cached prefixes are shared only with an equal salt")
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="smaller runs first")
    timeout: float | None = Field(None, description="seconds the answer may take; also the header x-request-timeout")
    user: str | None = Field(None, description="requests of one user may go to one worker: see router.policy")
    metadata: dict[str, str] | None = Field(None, description="accepted, not used")
    store: bool | None = Field(None, description="accepted, nothing is stored")
    service_tier: str | None = Field(None, description="accepted, not used")
    safety_identifier: str | None = Field(None, description="accepted, not used")
    prompt_cache_key: str | None = Field(None, description="as user, and before it; prefixes are cached by content")
    prompt_cache_retention: str | None = Field(None, description="accepted, not used")


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class AllowedNames(Body):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedTools(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedNames


ToolChoice = Annotated[NamedTool | AllowedTools, Field(discriminator="type")]


class ChatBody(SamplingFields):
    messages: Messages
    max_completion_tokens: int | None = Field(None, description="default: what is left of the model's length")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = Field(False, description="the template usually writes them itself")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="variables for the chat template")
    reasoning_effort: str | None = Field(None, description="a variable for the chat template")
    verbosity: str | None = Field(None, description="accepted, not used")
    tools: list[dict[str, Any]] | None = Field(None, description="functions that the model may call")
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = Field(
        None, description="default: auto with tools"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: the answer ends with its first call")
    include_reasoning: bool = Field(True, description="false: reasoning is left out of the answer")
    separate_reasoning: bool = Field(True, description="false: reasoning stays in the content, marks and all")
    modalities: list[Literal["text"]] | None = None


class CompletionBody(SamplingFields):
    prompt: Prompts
    logprobs: int | None = Field(None, description="alternatives per token, 0 to 20")
    echo: bool | None = None
    suffix: str | None = Field(None, description="not supported")
    best_of: int | None = Field(None, description="not supported beyond 1")
    add_special_tokens: bool = True


class TokenizeBody(Body):
    """A text, or messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="default: true for a prompt, false for messages")
    return_token_strs: bool | None = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]
