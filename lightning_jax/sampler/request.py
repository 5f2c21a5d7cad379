"""What goes into the engine and what comes out of it. No JAX here: HTTP handlers make these."""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

MAX_STOP_IDS = 16  # of the model and of the request together; each is compared with on the device


class QueueFull(RuntimeError):
    """As many requests are waiting as may wait; try again later."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_p: the smallest set of tokens whose probability reaches this is kept (arXiv:1904.09751); 1 keeps all.
        top_k: this many of the likeliest tokens are kept; 0 keeps all. It comes before top-p.
        max_tokens: most tokens to sample; clamped to the room that the context leaves.
        noise_key: two 32-bit words that name the request's random stream, see `noise_key`.
        stop_ids: token ids that end the reply, besides the model's own.
        ignore_eos: the model's own do not end it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    noise_key: tuple[int, int] = (0, 0)
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        if not (self.temperature >= 0.0 and np.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a finite number of at least 0, not {self.temperature}")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p must be between 0 and 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, not {self.top_k}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request.

    Attributes:
        token_ids: the sampled ids, the one that ended the reply included.
        logprobs: [len(token_ids)] float32, nats, of the distribution sampled from (after temperature, top-k and
            top-p); of the plain softmax where the request was greedy.
        finish_reason: "stop", "length", "cancelled" or "error".
        cached_tokens: prompt tokens whose keys and values another request had computed.
        policy_version: version of the weights when the request was admitted.
        error: what went wrong, where finish_reason is "error".
    """

    request_id: str
    token_ids: list[int]
    logprobs: np.ndarray
    finish_reason: str
    cached_tokens: int
    policy_version: int
    error: str | None = None


@dataclasses.dataclass
class Request:
    """One prompt to continue.

    Attributes:
        request_id: names it for `cancel`; unique among the requests in flight.
        on_done: called once, on the device thread; it must be quick.
        should_stop: called with all ids sampled so far whenever there are new ones; returns how many of them to keep
            if the reply ends there (stop strings), else None.
        on_tokens: called with the new ids and their log-probs whenever there are some (streaming).
        fairness_key: waiting requests are admitted in turns, one of each key at a time.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    on_done: Callable[[Completion], None]
    should_stop: Callable[[list[int]], int | None] | None = None
    fairness_key: str = ""
    on_tokens: Callable[[list[int], np.ndarray], None] | None = None


def noise_key(*parts: int | str) -> tuple[int, int]:
    """The random stream named by these parts, e.g. (seed, step, task, sample, call): two 32-bit words.

    The same on every machine and in every process; different types and different splits give different streams.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
