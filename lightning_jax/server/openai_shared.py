"""What OpenAI's dialects have in common on the wire: sampling fields (vLLM's among them), errors, usage, log-probs."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

import pydantic
from fastapi import Response

from lightning_jax.server import wire
from lightning_jax.server.contract import ApiError, Choice, Delta, Token
from lightning_jax.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"

# Fields that would change the result, with the values at which they change nothing.
UNSUPPORTED = {
    "min_p": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
}

_TYPES = {
    "invalid_request": ("invalid_request_error", None),
    "authentication": ("authentication_error", "invalid_api_key"),
    "not_found": ("invalid_request_error", "not_found"),
    "too_large": ("invalid_request_error", "request_too_large"),
    "context_length": ("invalid_request_error", "context_length_exceeded"),
    "rate_limit": ("rate_limit_error", "rate_limit_exceeded"),
    "server": ("server_error", None),
}

_VLLM_FORMS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}


class StreamOptions(pydantic.BaseModel):
    """What else a stream tells."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(pydantic.BaseModel):
    """The fields about sampling that chat completions and completions share, with vLLM's additions."""

    model_config = pydantic.ConfigDict(extra="allow")

    model: str | None = None
    n: int | None = pydantic.Field(None, ge=1, le=128)
    temperature: float | None = pydantic.Field(None, ge=0, le=2)
    top_p: float | None = pydantic.Field(None, ge=0, le=1)
    top_k: int | None = pydantic.Field(None, ge=-1)
    presence_penalty: float | None = pydantic.Field(None, ge=-2, le=2)
    frequency_penalty: float | None = pydantic.Field(None, ge=-2, le=2)
    repetition_penalty: float | None = pydantic.Field(None, ge=0.01, le=100)
    logit_bias: dict[int, float] | None = None
    max_tokens: int | None = pydantic.Field(None, ge=1)
    min_tokens: int | None = pydantic.Field(None, ge=0)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None


def sampling_of(body: SamplingBody) -> dict[str, Any]:
    """The fields of a `GenerateRequest` that come from a `SamplingBody`."""
    return {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": body.logit_bias,
        "min_tokens": body.min_tokens,
        "stop": wire.stop_strings([body.stop] if isinstance(body.stop, str) else body.stop, "stop"),
        "stop_ids": tuple(body.stop_token_ids or ()),
        "seed": body.seed,
        "n": body.n or 1,
        "ignore_eos": body.ignore_eos,
        "stream": bool(body.stream),
    }


def form_of(body: SamplingBody) -> tuple[str, Any] | None:
    """What vLLM's fields ask the reply to look like, as `GenerateRequest.form`."""
    asked = {name: getattr(body, f"guided_{name}") for name in _VLLM_FORMS} | (body.structured_outputs or {})
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked.pop("json_object", False):
        return "json_object", None
    if not asked:
        return None
    name, value = next(iter(asked.items()))
    if len(asked) > 1 or name not in _VLLM_FORMS:
        text = f"one of {', '.join(_VLLM_FORMS)} can be asked for, not {', '.join(asked)}"
        raise ApiError(text, param="structured_outputs")
    kind = {"regex": str, "choice": list, "grammar": str}.get(name, object)
    if not isinstance(value, kind):
        raise ApiError(f"structured_outputs.{name}: must be a {kind.__name__}", param="structured_outputs")
    return _VLLM_FORMS[name], value


def response_format(asked: dict | None, param: str = "response_format") -> tuple[str, Any] | None:
    """A `response_format`, or the responses dialect's `text.format`, as `GenerateRequest.form`."""
    if asked is not None and not isinstance(asked, dict):
        raise ApiError(f"{param}: must be an object", param=param)
    kind = (asked or {"type": "text"}).get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return "json_object", None
    if kind != "json_schema":
        raise ApiError(f"{param}.type: {kind!r} is not one of text, json_object, json_schema", param=param)
    spec = asked.get("json_schema", asked)
    if not isinstance(spec, dict) or not isinstance(spec.get("schema"), dict):
        raise ApiError(f"{param}: a json_schema needs a name and a schema", param=param)
    return ("json_schema" if spec.get("strict") else "json_schema_if_possible"), spec["schema"]


def check_tool_choice(asked: str, tools: list[dict] | None) -> None:
    """Raises ApiError unless `asked` is a `tool_choice`, and one that can be kept with these tools."""
    if asked not in ("auto", "none", "required"):
        raise ApiError(f"tool_choice: {asked!r} is not one of none, auto, required, an object", param="tool_choice")
    if asked == "required" and not tools:
        raise ApiError(f"tool_choice {asked!r} needs tools", param="tool_choice")


def error_response(error: ApiError) -> Response:
    """`error` in OpenAI's shape."""
    return wire.json_response(error_content(error), error.status, error.retry_after_s)


def error_content(error: ApiError) -> dict:
    """The JSON of it."""
    kind, code = _TYPES[error.kind]
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def error_event(error: ApiError) -> bytes:
    """The end of a stream that fails."""
    return wire.event(error_content(error)) + DONE


def envelope(prefix: str, kind: str, model: str) -> dict:
    """What every reply begins with."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict:
    """Token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def token_logprobs(sampled: Choice | Delta, tokenizer: Tokenizer) -> list[dict]:
    """The log-probs of a sample's text and tool calls, in chat completions' form."""
    tops = sampled.top_logprobs or [()] * len(sampled.token_ids)
    tokens = zip(sampled.token_ids, sampled.logprobs, tops, strict=True)
    return logprobs_of(list(tokens)[: sampled.num_text_tokens], tokenizer)


def logprobs_of(tokens: Sequence[Token], tokenizer: Tokenizer) -> list[dict]:
    """The log-probs of some tokens, in chat completions' form."""
    return [
        _token(token_id, logprob, tokenizer) | {"top_logprobs": [_token(*likely, tokenizer) for likely in top]}
        for token_id, logprob, top in tokens
    ]


def _token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}
