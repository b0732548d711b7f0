"""Calls between marks. Text outside them is content; a call that breaks before its name is known is content too.

A call that breaks later stays as far as it came: its arguments are cut, as OpenAI's clients expect of an answer
that ran into max_tokens. Marks that frame all calls (`opens`, `closes`) are no text where there are calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, NamedTuple

from common.text.parsers import json_text
from common.text.parsers.arguments import STRING, ArgumentWriter, Tools
from common.text.parsers.constraint import CallSyntax, FieldSyntax
from common.text.parsers.out import Out
from common.text.parsers.tape import Marks, Steps, Tape, close, peek_solid, short, take, until

ReadCall = Callable[[Tape, Out, Tools, str], Steps[bool]]  # the mark that began it last; False: none, nothing put out

TypesOf = Callable[[str], frozenset[str]]  # of a parameter
Key = Steps[tuple[str, frozenset[str]] | None]

_FUNCTION_NAME: Final = re.compile(r"[\w.:/-]+")


class MarkedFormat(NamedTuple):
    begins: tuple[str, ...]  # of a call
    read_call: ReadCall
    syntax: CallSyntax
    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()  # other marks that a tokenizer may have as special tokens
    reasoning_ends: tuple[str, ...] = ()  # marks that no model reasons about: they end reasoning

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.begins, *self.opens, *self.closes, *self.inner)

    def read(self, tape: Tape, out: Out, tools: Tools) -> Steps[None]:
        marks = Marks(*self.begins, *self.opens, *self.closes)
        while mark := (yield from until(tape, marks, out.content)):
            if mark in self.opens:
                out.hold(mark)
            elif mark in self.closes:
                if not out.after_call:
                    out.content(mark)
            else:
                tape.keep()  # until a call has begun
                if not (yield from self.read_call(tape, out, tools, mark)):
                    tape.rewind()
                    out.content(mark)
                tape.forget()


def _name(text: str) -> str:
    """A function's name; empty if it is none."""
    text = text.strip()
    return text if _FUNCTION_NAME.fullmatch(text) else ""


# -- JSON in <tool_call> ---------------------------------------------------------------------------------


def _hermes(tape: Tape, out: Out, tools: Tools, mark: str) -> Steps[bool]:
    yield from peek_solid(tape)
    found = yield from json_text.call(tape, out, None)
    if found:
        yield from close(tape, "</tool_call>")
    return found


_HERMES_CALL: Final = CallSyntax(
    '<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", separator="\n", trigger="<tool_call>"
)
HERMES: Final = MarkedFormat(("<tool_call>",), _hermes, _HERMES_CALL, closes=("</tool_call>",))


# -- DeepSeek V3, R1, V3.1 -------------------------------------------------------------------------------

_SEPARATOR: Final = Marks("<｜tool▁sep｜>")
_LINE: Final = Marks("\n")


def _deepseek(tape: Tape, out: Out, tools: Tools, mark: str) -> Steps[bool]:
    """V3.1: `name SEP {...}`. V3 and R1: `function SEP name`, and the arguments fenced as a block of JSON."""
    text, found = yield from short(tape, _SEPARATOR)
    name = _name(text)
    if not found or not name:
        return False
    fenced = False
    if name == "function" and (yield from peek_solid(tape)) != "{":
        text, found = yield from short(tape, _LINE)
        name = _name(text)
        if not found or not name:
            return False
        yield from peek_solid(tape)
        fenced = yield from take(tape, "```json")
    return (yield from _json_arguments(tape, out, name, "", fenced, "<｜tool▁call▁end｜>"))


def _json_arguments(tape: Tape, out: Out, name: str, call_id: str, fenced: bool, end: str) -> Steps[bool]:
    out.begin_call(name, call_id)
    tape.forget()
    if (yield from peek_solid(tape)) in ("<", "`"):  # no arguments, or the next mark cut short
        if (yield from close(tape, end)):
            out.arguments("{}")
            out.end_call()
        return True
    if not (yield from json_text.value(tape, out.arguments)):
        return True
    if fenced:
        yield from close(tape, "```")
    if (yield from close(tape, end)):
        out.end_call()
    return True


DEEPSEEK_V3: Final = MarkedFormat(
    ("<｜tool▁call▁begin｜>",),
    _deepseek,
    CallSyntax(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
        "\n```<｜tool▁call▁end｜>",
        separator="\n",
        opens="<｜tool▁calls▁begin｜>",
        closes="<｜tool▁calls▁end｜>",
        trigger="<｜tool▁calls▁begin｜>",
    ),
    opens=("<｜tool▁calls▁begin｜>",),
    closes=("<｜tool▁calls▁end｜>", "<｜tool▁call▁end｜>"),
    inner=("<｜tool▁sep｜>",),
)
DEEPSEEK_V31: Final = DEEPSEEK_V3._replace(
    syntax=DEEPSEEK_V3.syntax._replace(
        begin="<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>", end="<｜tool▁call▁end｜>", separator=""
    )
)


# -- Kimi-K2 ---------------------------------------------------------------------------------------------

_ARGUMENTS: Final = Marks("<|tool_call_argument_begin|>")


def _kimi(tape: Tape, out: Out, tools: Tools, mark: str) -> Steps[bool]:
    """`functions.name:0 ARGUMENTS {...}`; the id is all of what precedes."""
    text, found = yield from short(tape, _ARGUMENTS)
    call_id = text.strip()
    name = _name(call_id.rpartition(":")[0].removeprefix("functions.") if ":" in call_id else call_id)
    if not found or not name:
        return False
    return (yield from _json_arguments(tape, out, name, call_id if ":" in call_id else "", False, "<|tool_call_end|>"))


KIMI: Final = MarkedFormat(
    ("<|tool_call_begin|>",),
    _kimi,
    CallSyntax(
        "<|tool_call_begin|>functions.NAME:",
        "<|tool_call_end|>",
        opens="<|tool_calls_section_begin|>",
        closes="<|tool_calls_section_end|>",
        numbered="<|tool_call_argument_begin|>",
        trigger="<|tool_calls_section_begin|>",
    ),
    opens=("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>"),
    closes=("<|tool_calls_section_end|>", "<|tool_call_section_end|>", "<|tool_call_end|>"),
    inner=("<|tool_call_argument_begin|>",),
    reasoning_ends=("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>"),
)


# -- calls with a mark around each parameter -------------------------------------------------------------


class _Parameters(NamedTuple):
    """How a family writes them. `read_key`: the name that comes next and the types that its value may have; None: none.

    `ends`: what ends the call, with the mark of the frame behind it if there is one. `opening` and `name_end` stand
    around a name, `after` may follow it, `value_end` ends a value; `newlines` around a value belong to the format.
    """

    ends: Mapping[str, str]
    read_key: Callable[[Tape, TypesOf], Key]
    opening: str
    name_end: str
    value_end: Marks
    after: tuple[str, ...] = ()
    newlines: bool = False

    def read(self, tape: Tape, out: Out, tools: Tools, name: str) -> Steps[bool]:
        """From behind the call's name to its end. The call has begun then, whatever comes."""
        out.begin_call(name)
        tape.forget()
        writer = ArgumentWriter(out)
        while True:
            yield from peek_solid(tape)
            for end, frame in self.ends.items():
                if (yield from take(tape, end)):
                    writer.close()
                    if frame:
                        yield from close(tape, frame)
                    return True
            tape.keep()
            found = yield from self.read_key(tape, partial(tools.types, name))
            if found is None:
                writer.stop(tape, self.opening, self.name_end, closes=tuple(self.ends), after=self.after)
                return True
            tape.forget()
            if not (yield from writer.read(tape, *found, self.value_end, newlines=self.newlines)):
                return True


# -- GLM-4.5, 4.6, 4.7, 5 --------------------------------------------------------------------------------

_GLM_NAME: Final = Marks("\n", "<arg_key>", "</tool_call>")
_KEY_END: Final = Marks("</arg_key>")
_VALUE_END: Final = Marks("</arg_value>")


def _glm(tape: Tape, out: Out, tools: Tools, mark: str) -> Steps[bool]:
    yield from peek_solid(tape)
    text, found = yield from short(tape, _GLM_NAME)
    name = _name(text)
    if not found or not name:
        return False
    if found != "\n":
        tape.at -= len(found)
    return (yield from _GLM_PARAMETERS.read(tape, out, tools, name))


def _glm_key(tape: Tape, types: TypesOf) -> Key:
    begun = yield from take(tape, "<arg_key>")
    key, found = (yield from short(tape, _KEY_END)) if begun else ("", "")
    if found:
        yield from peek_solid(tape)
    if not found or not (yield from take(tape, "<arg_value>")):
        return None
    return key.strip(), types(key.strip())


_GLM_PARAMETERS: Final = _Parameters(
    {"</tool_call>": ""}, _glm_key, "<arg_key>", "</arg_key>", _VALUE_END, after=("<arg_value>",)
)
GLM45: Final = MarkedFormat(
    ("<tool_call>",),
    _glm,
    CallSyntax(
        "<tool_call>NAME\n",
        "</tool_call>",
        separator="\n",
        field=FieldSyntax("<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>\n"),
        trigger="<tool_call>",
    ),
    closes=("</tool_call>",),
    inner=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
GLM47: Final = GLM45._replace(
    syntax=CallSyntax(
        "<tool_call>NAME",
        "</tool_call>",
        field=FieldSyntax("<arg_key>KEY</arg_key><arg_value>", "</arg_value>"),
        trigger="<tool_call>",
    )
)


# -- Qwen3-Coder, Qwen3.5 --------------------------------------------------------------------------------

_ANGLE: Final = Marks(">")
_PARAMETER_END: Final = Marks("</parameter>")


def _qwen3_coder(tape: Tape, out: Out, tools: Tools, mark: str) -> Steps[bool]:
    if mark == "<tool_call>":
        yield from peek_solid(tape)
        if not (yield from take(tape, "<function=")):
            return False
    text, found = yield from short(tape, _ANGLE)
    name = _name(text)
    if not found or not name:
        return False
    return (yield from _QWEN3_PARAMETERS.read(tape, out, tools, name))


def _qwen3_key(tape: Tape, types: TypesOf) -> Key:
    begun = yield from take(tape, "<parameter=")
    key, found = (yield from short(tape, _ANGLE)) if begun else ("", "")
    return (key.strip(), types(key.strip())) if found else None


_QWEN3_PARAMETERS: Final = _Parameters(
    {"</function>": "</tool_call>", "</tool_call>": ""}, _qwen3_key, "<parameter=", ">", _PARAMETER_END, newlines=True
)
QWEN3_CODER: Final = MarkedFormat(
    ("<tool_call>", "<function="),
    _qwen3_coder,
    CallSyntax(
        "<tool_call>\n<function=NAME>\n",
        "</function>\n</tool_call>",
        separator="\n",
        field=FieldSyntax("<parameter=KEY>\n", "\n</parameter>\n"),
        trigger="<tool_call>",
    ),
    closes=("</tool_call>",),
)


# -- DeepSeek V3.2, V4 (DSML) ----------------------------------------------------------------------------

_HEADER_END: Final = Marks(">")
_DSML_END: Final = Marks("</｜DSML｜parameter>")
_DSML_FLAGS: Final = ('string="true">', 'string="false">')
_INVOKE: Final = re.compile(r'\s*name="([^"]+)"\s*')
_PARAMETER: Final = re.compile(r'\s*name="([^"]+)"\s*(?:string="(true|false)")?\s*')


def _dsml(tape: Tape, out: Out, tools: Tools, mark: str) -> Steps[bool]:
    text, found = yield from short(tape, _HEADER_END)
    header = _INVOKE.fullmatch(text)
    name = _name(header[1]) if header else ""
    if not found or not name:
        return False
    return (yield from _DSML_PARAMETERS.read(tape, out, tools, name))


def _dsml_key(tape: Tape, types: TypesOf) -> Key:
    begun = yield from take(tape, "<｜DSML｜parameter")
    text, found = (yield from short(tape, _HEADER_END)) if begun else ("", "")
    header = _PARAMETER.fullmatch(text)
    if not found or not header:
        return None
    own = types(header[1])
    return header[1], STRING if header[2] == "true" and "string" in own else own


_DSML_PARAMETERS: Final = _Parameters(
    {"</｜DSML｜invoke>": ""}, _dsml_key, '<｜DSML｜parameter name="', '"', _DSML_END, after=_DSML_FLAGS
)
DEEPSEEK_V32: Final = MarkedFormat(
    ("<｜DSML｜invoke",),
    _dsml,
    CallSyntax(
        '<｜DSML｜invoke name="NAME">\n',
        "</｜DSML｜invoke>\n",
        opens="<｜DSML｜function_calls>\n",
        closes="</｜DSML｜function_calls>",
        field=FieldSyntax('<｜DSML｜parameter name="KEY" string="TYPED">', "</｜DSML｜parameter>\n"),
        trigger="<｜DSML｜function_calls>",
    ),
    opens=("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>"),
    closes=("</｜DSML｜function_calls>", "</｜DSML｜tool_calls>"),
    inner=("｜DSML｜",),
)
DEEPSEEK_V4: Final = DEEPSEEK_V32._replace(
    syntax=DEEPSEEK_V32.syntax._replace(
        opens="<｜DSML｜tool_calls>\n", closes="</｜DSML｜tool_calls>", trigger="<｜DSML｜tool_calls>"
    )
)
