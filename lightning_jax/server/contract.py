"""What a dialect and `generate` say to each other."""

import dataclasses
from collections.abc import Sequence


class ApiError(Exception):
    """A request that gets no completion.

    Attributes:
        status: HTTP status.
        kind: "invalid_request", "authentication", "not_found", "too_large", "context_length", "rate_limit" or "server".
        param: the field that is wrong, if one is.
        retry_after_s: when it may be tried again; only with "rate_limit".
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request",
        param: str | None = None,
        retry_after_s: int | None = None,
    ):
        self.message, self.status, self.kind, self.param, self.retry_after_s = (
            message,
            status,
            kind,
            param,
            retry_after_s,
        )
        super().__init__(message)


class ClientGone(Exception):
    """The client closed its connection before the end of the reply."""


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """What a dialect asks for. None leaves the choice to the server.

    Attributes:
        dialect: its name, kept with the call.
        messages: in the OpenAI chat shape; `text.chat.canonical_messages` checks them.
        tools: function tools in the OpenAI shape.
        parse_tools: whether tool calls in the reply are taken out of its text.
        continue_final: the last message, of the assistant, is the beginning of the reply.
        n: how many samples of the one prompt.
        stream: whether the reply is asked for as `Generation.events`.
    """

    dialect: str
    messages: Sequence[dict]
    tools: Sequence[dict] | None = None
    parse_tools: bool = True
    continue_final: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    ignore_eos: bool = False
    stream: bool = False


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
    """

    content: str
    tool_calls: list[dict]
    token_ids: list[int]
    logprobs: list[float]
    num_text_tokens: int
    finish_reason: str
    stop_string: str | None


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is new of one sample of a stream.

    Attributes:
        index: of the sample.
        content, tool_calls: as in `Choice`; a call comes whole.
        token_ids, logprobs: sampled since the sample's previous delta.
        num_text_tokens: how many of them are text.
        choice: the whole sample, in its last delta.
    """

    index: int
    content: str
    tool_calls: list[dict]
    token_ids: list[int]
    logprobs: list[float]
    num_text_tokens: int
    choice: Choice | None = None


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
