"""What a dialect and `generate` say to each other."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from lightning_jax.text.tools import CallPiece

TopLogprobs = list[list[tuple[int, float]]]  # for each token, the likeliest ones as (id, log-prob)
Token = tuple[int, float, list[tuple[int, float]]]  # its id, its log-prob, the likeliest ones if they were asked for


class ApiError(Exception):
    """A request that gets no completion.

    Attributes:
        status: HTTP status.
        kind: "invalid_request", "authentication", "not_found", "too_large", "context_length", "rate_limit" or "server".
        param: the field that is wrong, if one is.
        retry_after_s: when it may be tried again; only with "rate_limit".
        details: more for programs to read, where the dialect has a place for it.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request",
        param: str | None = None,
        retry_after_s: int | None = None,
        details: dict | None = None,
    ):
        self.message, self.status, self.kind, self.param = message, status, kind, param
        self.retry_after_s, self.details = retry_after_s, details
        super().__init__(message)


class ClientGone(Exception):
    """The client closed its connection before the end of the reply."""


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """What a dialect asks for. None leaves the choice to the server.

    Attributes:
        dialect: its name, kept with the call.
        messages: in the OpenAI chat shape; `text.chat.canonical_messages` checks them.
        prompt: a text, or token ids, to write on; instead of messages.
        tools: function tools in the OpenAI shape.
        tool_choice: "none" leaves tool calls in the reply's text; "required" has it begin with one.
        tool_name: of the only tool that may be called; None for any.
        parallel_tool_calls: whether there may be more than one call.
        form: what the text of the reply must look like: ("json_object", None), ("json_schema", schema), ("regex",
            pattern), ("choice", texts) or ("grammar", EBNF); None for anything. "json_schema_if_possible" is any object
            where the schema cannot be enforced.
        stop_ids: token ids that end the reply, besides the model's own.
        continue_final: the last message, of the assistant, is the beginning of the reply.
        n: how many samples of the one prompt.
        stream: whether the reply is asked for as `Generation.events`.
        content_tokens: whether `Choice.content_tokens` are wanted.
    """

    dialect: str
    messages: Sequence[dict] = ()
    prompt: str | Sequence[int] | None = None
    tools: Sequence[dict] | None = None
    tool_choice: Literal["auto", "none", "required"] = "auto"
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    form: tuple[str, Any] | None = None
    continue_final: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    top_logprobs: int = 0
    min_tokens: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    seed: int | None = None
    n: int = 1
    ignore_eos: bool = False
    stream: bool = False
    content_tokens: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """One sample.

    Attributes:
        content: its text without the turn's end, the stop string, and the tool calls.
        tool_calls: in the OpenAI shape, `arguments` as JSON text.
        token_ids, logprobs: everything that was sampled.
        num_text_tokens: how many of them are text, that is, all but an end-of-turn id.
        finish_reason: "stop", "length" or "tool_calls".
        stop_string: the stop string that ended it, if one did.
        top_logprobs: of every sampled token, if they were asked for.
        content_tokens: those that the content came of, which a tool call's are not, if they were asked for.
    """

    content: str
    tool_calls: list[dict]
    token_ids: list[int]
    logprobs: list[float]
    num_text_tokens: int
    finish_reason: str
    stop_string: str | None
    top_logprobs: TopLogprobs | None = None
    content_tokens: Sequence[Token] = ()


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is new of one sample of a stream.

    Attributes:
        index: of the sample.
        content: as in `Choice`.
        call_pieces: what is new of tool calls. A call comes whole, for until its end it may turn out to be text; but in
            pieces where a grammar holds it to its form.
        token_ids, logprobs, top_logprobs: sampled since the sample's previous delta.
        num_text_tokens: how many of them are text.
        choice: the whole sample, in its last delta.
        content_tokens: as in `Choice`; of those that were held back, some may be an earlier delta's `token_ids`.
    """

    index: int
    content: str
    call_pieces: list[CallPiece]
    token_ids: list[int]
    logprobs: list[float]
    num_text_tokens: int
    choice: Choice | None = None
    top_logprobs: TopLogprobs | None = None
    content_tokens: Sequence[Token] = ()


@dataclasses.dataclass(frozen=True)
class GenerateReply:
    """The samples of one request, and what they cost."""

    choices: list[Choice]
    prompt_ids: list[int]
    cached_tokens: int
    policy_version: int

    @property
    def completion_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)
