"""What goes into the engine and what comes out of it. No JAX here: HTTP handlers make these."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

MAX_STOP_IDS = 16  # of the model and of the request together; each is compared with on the device
MAX_TOP_LOGPROBS = 20


class Cursor(Protocol):
    """How far one reply has come in its grammar; see `text.guided.Cursor`."""

    finished: bool

    def mask(self) -> np.ndarray: ...

    def accept(self, token_id: int) -> None: ...


class Grammar(Protocol):
    """What a reply must look like; see `text.guided.Grammar`."""

    def start(self) -> Cursor: ...


class QueueFull(RuntimeError):
    """As many requests are waiting as may wait; try again later."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    The logits of a step go through the repetition penalty, the other penalties and the bias, the grammar and
    `min_tokens`, the temperature, top-k and top-p, in this order.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_p: the smallest set of tokens whose probability reaches this is kept (arXiv:1904.09751); 1 keeps all.
        top_k: this many of the likeliest tokens are kept; 0 keeps all. It comes before top-p.
        max_tokens: most tokens to sample; clamped to the room that the context leaves.
        noise_key: two 32-bit words that name the request's random stream, see `noise_key`.
        stop_ids: token ids that end the reply, besides the model's own.
        ignore_eos: the model's own do not end it.
        presence_penalty: subtracted from the logit of every token that the reply already has.
        frequency_penalty: subtracted from a token's logit once for each time that the reply already has it.
        repetition_penalty: the logits of tokens in prompt and reply are divided by it where they are positive and
            multiplied with it where they are negative (arXiv:1909.05858); 1 changes nothing, and it is between 0.01 and
            100.
        logit_bias: (token id, what is added to its logit) pairs.
        min_tokens: the ids that end the reply have no probability before it is this long.
        top_logprobs: how many of the likeliest tokens are reported for each sampled one, at most 20.
        grammar: what the reply must look like, from a `text.guided.Guide` of the model's tokenizer; None for anything.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    noise_key: tuple[int, int] = (0, 0)
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    top_logprobs: int = 0
    grammar: Grammar | None = None

    @property
    def constrained(self) -> bool:
        """Whether the tokens are not drawn from the model's own distribution, at the temperature, but a changed one."""
        filtered = self.temperature > 0.0 and (self.top_p < 1.0 or self.top_k > 0)
        return filtered or self.penalized or self.min_tokens > 0 or self.grammar is not None

    @property
    def penalized(self) -> bool:
        """Whether a penalty or a bias changes the logits."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0 or self.logit_bias
        )

    def __post_init__(self):
        if not (self.temperature >= 0.0 and np.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a finite number of at least 0, not {self.temperature}")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p must be between 0 and 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, not {self.top_k}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise ValueError(f"{name} must be between -2 and 2, not {getattr(self, name)}")
        if not 0.01 <= self.repetition_penalty <= 100.0:
            raise ValueError(f"repetition_penalty must be between 0.01 and 100, not {self.repetition_penalty}")
        if not all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias):
            raise ValueError("a logit_bias must be between -100 and 100")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be at least 0, not {self.min_tokens}")
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}, not {self.top_logprobs}")


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request.

    Attributes:
        token_ids: the sampled ids, the one that ended the reply included.
        logprobs: [len(token_ids)] float32, nats, of the distribution sampled from, after everything that
            `SamplingParams` asks for; where the request was greedy, of the softmax at temperature 1 without top-k
            and top-p.
        finish_reason: "stop", "length", "cancelled" or "error".
        cached_tokens: prompt tokens whose keys and values another request had computed.
        policy_version: version of the weights when the request was admitted.
        last_policy_version: of those that sampled its last token: a later one if weights were published meanwhile.
        error: what went wrong, where finish_reason is "error".
        top_logprobs: for each sampled token, the likeliest tokens of the same distribution as (id, log-prob), likeliest
            first, those without any probability left out; None if the request asked for none.
        constrained: the tokens were not drawn from the model's own distribution, see `SamplingParams.constrained`.
    """

    request_id: str
    token_ids: list[int]
    logprobs: np.ndarray
    finish_reason: str
    cached_tokens: int
    policy_version: int
    last_policy_version: int
    error: str | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    constrained: bool = False


@dataclasses.dataclass
class Request:
    """One prompt to continue.

    Attributes:
        request_id: names it for `cancel`; unique among the requests in flight.
        on_done: called once, on the device thread; it must be quick.
        should_stop: called with all ids sampled so far whenever there are new ones; returns how many of them to keep
            if the reply ends there (stop strings), else None.
        on_tokens: called with the new ids, their log-probs and the policy versions that sampled the reply's first
            token and its last so far, whenever there are some (streaming).
        on_top_logprobs: called before `on_tokens` with the same tokens' `Completion.top_logprobs`.
        fairness_key: waiting requests are admitted in turns, one of each key at a time.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    on_done: Callable[[Completion], None]
    should_stop: Callable[[list[int]], int | None] | None = None
    fairness_key: str = ""
    on_tokens: Callable[[list[int], np.ndarray, tuple[int, int]], None] | None = None
    on_top_logprobs: Callable[[list[list[tuple[int, float]]] | None], None] | None = None


def noise_key(*parts: int | str) -> tuple[int, int]:
    """The random stream named by these parts, e.g. (seed, step, task, sample, call): two 32-bit words.

    The same on every machine and in every process; different types and different splits give different streams.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
