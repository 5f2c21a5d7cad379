"""Distributions that are not the model's alone, on the host: grammars, penalties, biases, replies of at least a length.

The device is told before a step which tokens a request may take and what is added to their logits. Where that depends
on the token before, the request takes one step and waits until the host has seen it; see `programs.Shaping` for what
the device makes of it.
"""

import collections

import numpy as np

from lightning_jax.sampler.request import SamplingParams

_ALL = np.uint32(0xFFFFFFFF)


class Shape:
    """What one request wants of its distribution, as far as its reply has come.

    Attributes:
        top_logprobs: for each token of the reply, as in `Completion`.
        placed: the request's slot on the device says how it goes on, as for requests that need no shape. Where it does
            not, the dispatch that samples its next token must.
    """

    def __init__(self, sampling: SamplingParams, prompt_ids: list[int], stop_ids: tuple[int, ...], vocab_size: int):
        """Raises ValueError: a biased token is outside the vocabulary, or the grammar cannot begin."""
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._stop_ids = np.array([index for index in stop_ids if index < vocab_size], np.int64)
        self._cursor = None if sampling.grammar is None else sampling.grammar.start()
        self._mask_w = None if self._cursor is None else self._cursor.mask()
        self._length = 0
        self._counts: collections.Counter[int] = collections.Counter()  # of the reply's ids
        self._bias_v: np.ndarray | None = None
        self._seen_w: np.ndarray | None = None
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.placed = False
        if sampling.penalized:
            self._bias_v = np.zeros(vocab_size, np.float32)
            for index, bias in sampling.logit_bias:
                if not 0 <= index < vocab_size:
                    raise ValueError(f"logit_bias names token {index}, outside the vocabulary of {vocab_size}")
                self._bias_v[index] += bias
            self._seen_w = np.zeros(mask_words(vocab_size), np.uint32)
            _set_bits(self._seen_w, np.unique(prompt_ids))

    @property
    def stepwise(self) -> bool:
        """Whether the distribution of the next token depends on the one before."""
        s = self._sampling
        counted = s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0
        return bool(counted) or self._cursor is not None or self._length < s.min_tokens

    @property
    def penalized(self) -> bool:
        return self._sampling.penalized

    @property
    def in_force(self) -> bool:
        """Whether there is anything left to ask of the device (a reply's least length is reached sometime)."""
        return self.stepwise or self.penalized or self.wants_top

    @property
    def wants_top(self) -> bool:
        return self._sampling.top_logprobs > 0

    @property
    def finished(self) -> bool:
        """The grammar says that the reply has ended."""
        return self._cursor is not None and self._cursor.finished

    def accept(self, token_ids: list[int]) -> None:
        """Takes in what was sampled.

        Raises:
            ValueError: the grammar does not allow it, or cannot go on.
        """
        for index in token_ids:
            self._length += 1
            if self._bias_v is not None:
                self._count(index)
            if self._cursor is not None:
                self._cursor.accept(index)
                if not self._cursor.finished:
                    self._mask_w = self._cursor.mask()

    def _count(self, index: int) -> None:
        self._bias_v[index] -= self._sampling.frequency_penalty
        if not self._counts[index]:
            self._bias_v[index] -= self._sampling.presence_penalty
            _set_bits(self._seen_w, np.array([index]))
        self._counts[index] += 1

    def add_top(self, id_tn: np.ndarray, logprob_tn: np.ndarray) -> None:
        """Takes in the likeliest tokens of some steps, likeliest first."""
        wanted = self._sampling.top_logprobs
        for ids, logprobs in zip(id_tn[:, :wanted], logprob_tn[:, :wanted], strict=True):
            possible = logprobs > -np.inf
            self.top_logprobs.append(list(zip(ids[possible].tolist(), logprobs[possible].tolist(), strict=True)))

    def write_mask(self, allowed_w: np.ndarray) -> None:
        """Clears the bits of tokens that may not come next, in a [W] uint32 row whose bits are all set."""
        if self._mask_w is not None:
            mask_w = self._mask_w[: len(allowed_w)]
            allowed_w[: len(mask_w)] = mask_w
            allowed_w[len(mask_w) :] = 0
        if self._length < self._sampling.min_tokens:
            stops_w = np.zeros_like(allowed_w)
            _set_bits(stops_w, self._stop_ids)
            if (allowed_w & ~stops_w).any():  # else the grammar is complete, and has the last word
                allowed_w &= ~stops_w

    def write_penalties(self, bias_v: np.ndarray, seen_w: np.ndarray) -> float:
        """Fills in what is added to each logit, and which tokens there were; returns the repetition penalty."""
        bias_v[:] = self._bias_v
        seen_w[:] = self._seen_w
        return self._sampling.repetition_penalty


def mask_words(vocab_size: int) -> int:
    """W, the 32-bit words that hold a bit for each token."""
    return -(-vocab_size // 32)


def all_allowed(rows: int, vocab_size: int) -> np.ndarray:
    """[rows, W] uint32, every bit set."""
    return np.full((rows, mask_words(vocab_size)), _ALL)


def _set_bits(mask_w: np.ndarray, indices: np.ndarray) -> None:
    np.bitwise_or.at(mask_w, indices // 32, np.uint32(1) << (indices % 32).astype(np.uint32))
