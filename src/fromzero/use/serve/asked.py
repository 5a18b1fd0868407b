"""A request's JSON in, what it asks for out, checked field by field and named as OpenAI's API names it. Knows no model.

source: the API reference of OpenAI, chat completions, completions and embeddings; top_k, min_p and repetition_penalty as vLLM adds them
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

import fromzero.use.serve.limits as bounds
from fromzero.data.table import parse_json
from fromzero.errors import Fault, did_you_mean
from fromzero.use.serve.refusal import Refused

# What could make a server read, fetch or run something of the sender's choice. None of it is looked at.
_NEVER = {
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "template"), "the template comes with the model"),
    **dict.fromkeys(("file", "files", "path", "url", "image_url", "documents"), "no file is read and no address fetched for a request"),
    **dict.fromkeys(("lora_path", "adapter", "model_path"), "the model is the one that the server was started with"),
}
# Fields of OpenAI's that say something here only with one value, and what to take instead
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((0, None), "repetition_penalty is there"),
    "presence_penalty": ((0, None), "repetition_penalty is there"),
    "logit_bias": (({}, None), "response_format bounds what is said"),
    "best_of": ((1, None), "ask for n and choose"),
    "echo": ((False, None), "the prompt is known to who sent it"),
    "suffix": (("", None), "the model goes on with text, it fills no gaps"),
    "modalities": ((["text"], None), ""),
    "dimensions": ((None,), "the model's own width is given"),
}
# Fields of OpenAI's that change nothing here
_IDLE = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key", "reasoning_effort")


def _joined(content: Any) -> Any:
    """A content of parts becomes one text; parts of another kind would have to be fetched."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"a part of it is {str(kind)[:40]!r}, and only text is read; nothing is fetched")
    return "".join(part["text"] for part in content)


def _listed(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """A text, ids, or a list of either → a list of either"""
    several = isinstance(value, list) and bool(value) and not isinstance(value[0], int)
    listed = value if several else [value]
    for one in listed:
        ids = isinstance(one, list) and all(type(token) is int for token in one)
        if not (isinstance(one, str) or ids):
            raise ValueError("it is a text, a list of token ids, or a list of either")
        if not one:
            raise ValueError("it is empty; there is nothing to go on with")
    return listed


Whole = Annotated[int, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)]  # 3.0 too


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None

    def seen(self) -> dict[str, Any]:
        """As a template sees it; it knows no developer."""
        said = {name: value for name, value in self if value is not None}
        if self.tool_calls:
            said["tool_calls"] = [_with_arguments(call) for call in self.tool_calls]
        return {**said, "role": "system" if self.role == "developer" else self.role, "content": self.content or ""}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments as an object, which templates write; the API has them as a text."""
    try:
        function = call["function"]
        return {**call, "function": {**function, "arguments": read_json(function["arguments"].encode())}}
    except (Refused, KeyError, TypeError, AttributeError):
        return call


class Function(_Strict):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function

    def seen(self) -> dict[str, Any]:
        return {"type": self.type, "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class StreamOptions(_Strict):
    include_usage: bool = False


class Schema(_Strict):
    name: str = Field(max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class Asked(_Strict):
    """What chat and plain completions share. Left out, temperature is 1, as the API has it."""

    model: str
    n: Whole = Field(1, ge=1, le=bounds.MOST_TEXTS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=1, le=2**20)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: Whole | None = Field(None, ge=-(2**62), le=2**62)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=bounds.LONGEST_STOP)]],
        BeforeValidator(_listed),
        Field(max_length=bounds.MOST_STOPS),
    ] = []
    response_format: ResponseFormat | None = None


class Chat(Asked):
    messages: list[Message] = Field(min_length=1, max_length=bounds.MOST_MESSAGES)
    max_tokens: Whole = Field(1024, ge=1, le=bounds.MOST_TOKENS)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=bounds.MOST_TOKENS)
    tools: list[Tool] = Field([], max_length=bounds.MOST_TOOLS)
    tool_choice: Literal["auto", "none"] = "auto"
    logprobs: bool = False
    top_logprobs: Whole = Field(0, ge=0, le=bounds.MOST_LIKELIEST)


class Completion(Asked):
    prompt: Annotated[list[Any], BeforeValidator(_prompts), Field(max_length=bounds.MOST_TEXTS)]
    max_tokens: Whole = Field(16, ge=1, le=bounds.MOST_TOKENS)
    logprobs: Whole | None = Field(None, ge=0, le=bounds.MOST_LIKELIEST)


class Embedding(_Strict):
    model: str
    input: Annotated[list[Any], BeforeValidator(_prompts), Field(max_length=bounds.MOST_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"


class Rows(_Strict):
    model: str | None = None
    rows: list[Any] = Field(min_length=1, max_length=bounds.MOST_ROWS)


Kind = TypeVar("Kind", bound=_Strict)


def read_json(body: bytes) -> Any:
    """raises: Refused for what is no JSON, nested too deep, or names a key twice"""
    faults: list[Fault] = []
    try:
        value = parse_json(body.decode(), Path("body"), 1, faults)
    except UnicodeDecodeError as error:
        raise Refused(400, f"byte {error.start} of the body is not UTF-8", mend="send JSON in UTF-8") from None
    if faults:
        raise Refused(400, str(faults[0]))
    return value


def check(kind: type[Kind], value: Any) -> Kind:
    """raises: Refused naming the first field that is wrong"""
    if not isinstance(value, Mapping):
        raise Refused(400, f"the body is {type(value).__name__}, not a JSON object")
    for name in value:
        if name in _NEVER and name not in kind.model_fields:
            raise Refused(400, "is not taken from a request", why=_NEVER[name], mend="leave it out", param=name)
    for name, (fine, instead) in _ONLY.items():
        if name in value and value[name] not in fine:
            raise Refused(400, f"is not known here beyond {fine[0]!r}", mend=instead, param=name)
    said = {name: value[name] for name in value if name not in _ONLY and name not in _IDLE}
    given = {name: one for name, one in said.items() if one is not None or name == "content"}  # null is what is left out
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        known = kind.model_fields if len(first["loc"]) == 1 else ()
        mend = did_you_mean(str(first["loc"][-1]), known) if first["type"] == "extra_forbidden" else ""
        raise Refused(400, _said(first), mend=mend, param=param) from None


def _said(error: Any) -> str:
    what = {"extra_forbidden": "is no field that is known here", "missing": "is missing"}.get(error["type"])
    got = error["input"]
    shown = f", not {got!r:.40}" if isinstance(got, (int, float, str, type(None))) and not what else ""
    return what or error["msg"].removeprefix("Value error, ").replace("Input should be", "should be") + shown


def check_finite(row: Mapping[str, Any], param: str) -> None:
    """raises: Refused for a cell that is nested or no finite number, which JSON does not have"""
    for name, cell in row.items():
        if isinstance(cell, (list, dict)):
            raise Refused(400, f"is {type(cell).__name__}, not one cell", param=f"{param}.{name}")
        if isinstance(cell, float) and not math.isfinite(cell):
            raise Refused(400, f"is {cell}, no number of JSON", mend="null is a cell with nothing in it", param=f"{param}.{name}")
