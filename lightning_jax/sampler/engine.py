"""The engine: requests in, completions out, one round of device work at a time.

A round prefills what was admitted, decodes a few tokens for everyone, and only then reads what the round before
sampled, so the device has work while the host thinks. Rows that stop in the middle of a round stop on the device; the
host learns of it one round late and loses nothing but an idle row.

A request whose next token depends on what the host makes of the last one (a grammar, penalties) has a `shaping.Shape`.
It takes one step of a round, sits out the next one while its token is read, and then takes part with a new mask; the
others in the batch sample on. Rounds that hold such a request run another compiled program than those that do not.
"""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax.model.llama import LlamaConfig, Params
from lightning_jax.sampler import executor, programs, scheduler, scoring
from lightning_jax.sampler.request import MAX_STOP_IDS, Completion, QueueFull, Request, SamplingParams, noise_key
from lightning_jax.sampler.shaping import Shape

__all__ = ["Completion", "Engine", "QueueFull", "Request", "SamplingParams", "noise_key"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Round:
    """A dispatched decode round.

    Attributes:
        members: (sequence, its row, tokens in flight on its account, whether the one it began with is among them).
        sampled, top: see `programs.decode`; `top` only if somebody wants to know.
        version: of the weights.
    """

    members: list[tuple[scheduler.Sequence, int, int, bool]]
    sampled: jax.Array
    top: jax.Array | None
    version: int


class Engine:
    """Continuous batching for one set of weights.

    `submit`, `cancel` and `stats` may be called from any thread; everything else belongs to the device thread.

    Args:
        config: the model.
        params: its weights in the master (stacked) form; copied.
        max_slots: requests that run at once.
        page_size: tokens per KV page, a power of two.
        num_pages: KV pages; they must hold one sequence of `max_seq_len`.
        max_seq_len: prompt and sampled tokens together.
        decode_steps: tokens sampled per dispatch.
        prefill_chunk: most prompt tokens of one request in one dispatch, a power of two.
        dtype: of weights, activations and cache.
        eos_ids: ids that end a reply; the model's own by default.
        max_queue: requests that may wait.
        row_floor: fewest rows that a matrix product gets, a power of two. XLA's CPU kernels sum a row in one order for
            all numbers of rows from 2 on (see `programs.prepare_params`), so that what a request samples is the same to
            the last bit in any company.
        mesh: shards KV heads over the mesh's "tensor" axis; the weights keep the sharding they come with.
        version: of `params`.
        tell: how the engines of other processes learn of this one's dispatches, for `replay`; see `executor.Executor`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Params,
        *,
        num_pages: int,
        max_seq_len: int,
        max_slots: int = 64,
        page_size: int = 16,
        decode_steps: int = 8,
        prefill_chunk: int = 256,
        dtype: jnp.dtype = jnp.float32,
        eos_ids: tuple[int, ...] | None = None,
        max_queue: int = 4096,
        row_floor: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        version: int = 0,
        tell: Callable[..., None] | None = None,
    ):
        self.config = config
        self.max_seq_len = max_seq_len
        self.max_queue = max_queue
        self.decode_steps = decode_steps
        self.version = version
        self._eos_ids = tuple(config.eos_ids if eos_ids is None else eos_ids)
        row_floor = row_floor or (16 if jax.default_backend() == "cpu" else 8)
        prefill_chunk = max(page_size, min(prefill_chunk, executor.power_of_two(max_seq_len)))
        shapes = executor.prefill_shapes(prefill_chunk, page_size, max_slots, row_floor)
        common = {
            "max_slots": max_slots,
            "page_size": page_size,
            "num_pages": num_pages,
            "max_seq_len": max_seq_len,
            "decode_steps": decode_steps,
            "prefill_shapes": shapes,
        }
        self._scheduler = scheduler.Scheduler(**common)
        self._executor = executor.Executor(
            config,
            **common,
            dtype=dtype,
            row_floor=row_floor,
            mesh=mesh,
            page_table=self._scheduler.page_table,
            tell=tell,
        )
        self._executor.publish(params)
        self._prefill_budget = 4 * max(shape.tokens for shape in shapes)  # tokens a round, padding included

        self._lock = threading.Lock()
        self._inbox: collections.deque[scheduler.Sequence] = collections.deque()
        self._cancelled: collections.deque[str] = collections.deque()
        self._in_flight: dict[str, scheduler.Sequence] = {}  # every request between submit and on_done
        self._rounds: collections.deque[_Round] = collections.deque()  # dispatched, not read
        self._failed: str | None = None  # why nothing is sampled any more
        self._most_steps = 1  # of the next round
        self._counts: collections.Counter[str] = collections.Counter()

    # Any thread -------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            QueueFull: `max_queue` requests are waiting.
            RuntimeError: `fail_all` was called.
            ValueError: the prompt is empty or leaves no room in the context, a token id is none of the model's, there
                are too many stop ids, a bias names none of the model's tokens, the grammar cannot begin, or the
                request id is in use.
        """
        sequence = self._sequence(request)
        with self._lock:
            if self._failed is not None:
                raise RuntimeError(f"the device thread has ended: {self._failed}")
            self.check_room()
            if request.request_id in self._in_flight:
                raise ValueError(f"a request with the id {request.request_id!r} is in flight")
            self._in_flight[request.request_id] = sequence
            self._inbox.append(sequence)

    def check_room(self, count: int = 1) -> None:
        """Raises QueueFull where so many more requests, which belong together, would be too many.

        ValueError where they are too many at any time.
        """
        if count > self.max_queue:
            text = f"n: {count} samples of one request are more than may ever wait"
            raise ValueError(f"{text}, sampler.max_queue={self.max_queue}")
        waiting = len(self._inbox) + self._scheduler.num_waiting
        if waiting + count > self.max_queue:
            more = f", {count} more came together" if count > 1 else ""
            raise QueueFull(f"{waiting} requests are waiting{more}, and no more than {self.max_queue} may")

    def cancel(self, request_id: str) -> None:
        """Ends a request in the next round, with what it has sampled; one that is not in flight is left alone."""
        self._cancelled.append(request_id)

    def stats(self) -> dict[str, int]:
        """Counters since the start and gauges of this moment.

        Counters: requests (ended), generated_tokens, prefill_tokens (computed), cached_tokens (of prompts, that others
        had computed), prefill_dispatches, decode_rounds, decode_steps, preemptions. Gauges: running, queue_length,
        free_pages (cached ones included), cached_pages, num_pages.
        """
        pool = self._scheduler.pool
        counters = (
            "requests",
            "generated_tokens",
            "prefill_tokens",
            "cached_tokens",
            "prefill_dispatches",
            "decode_rounds",
            "decode_steps",
            "preemptions",
        )
        return {name: self._counts[name] for name in counters} | {
            "running": len(self._scheduler.running),
            "queue_length": len(self._inbox) + self._scheduler.num_waiting,
            "free_pages": pool.available,
            "cached_pages": pool.cached,
            "num_pages": pool.num_pages,
        }

    # The device thread ------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One round: admit, prefill, decode, deliver what the previous one sampled. False if there is nothing to do.

        After a pause rounds begin with one step and double: who comes first is seldom alone for long.
        """
        worked = self._take_in()
        worked |= self._prefill()
        unread = len(self._rounds)
        members = self._plan_decode()
        worked |= len(self._rounds) < unread  # it may have read what ended the last of them
        if members:
            self._decode(members)
            worked = True
        while len(self._rounds) > bool(members):
            self._read_round()
            worked = True
        if not worked:
            self._most_steps = 1
        return worked

    def publish(self, params: Params, version: int) -> None:
        """Gives the next round new weights (stacked, any dtype; copied). Cached prefixes are forgotten.

        Requests that are running continue with the new weights; their completions name the version they began with.
        """
        self._executor.publish(params)
        self._scheduler.flush()
        self.version = version

    def rest(self) -> None:
        """Frees the weights until `publish`, before which no round may run. Running requests keep their pages."""
        self._executor.rest()

    def replay(self, dispatch: Callable[..., object], *args) -> None:
        """Makes a dispatch that another process's engine told of."""
        dispatch(self._executor, *args)

    def score(self, token_ids: list[int]) -> scoring.Scores:
        """Log-probs of a sequence under the weights that are sampled from."""
        return self._executor.score(token_ids)

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles every program that requests can need. `progress(done, total)` is called after each."""
        self._executor.warmup(progress)

    def fail_all(self, error: str) -> None:
        """Ends every request with an error, also those to come; for when the device thread does not go on."""
        with self._lock:
            self._failed = error
        self._take_in()
        for sequence in list(self._in_flight.values()):
            self._deliver(sequence, "error", error)

    # Rounds -----------------------------------------------------------------------------------------------------------

    def _take_in(self) -> bool:
        """Moves new requests to the scheduler and ends cancelled ones; True if any was ended."""
        cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]  # first: those are in the inbox
        while self._inbox:
            self._scheduler.add(self._inbox.popleft())
        ended = False
        for request_id in cancelled:
            sequence = self._in_flight.get(request_id)
            if sequence is not None:
                self._deliver(sequence, "cancelled")
                ended = True
        return ended

    def _prefill(self) -> bool:
        """Admits and prefills until there is no more to do, or this round's share of prompt tokens is used up."""
        budget = self._prefill_budget
        worked = False
        while budget > 0:
            self._scheduler.admit(self.version)
            idle = True
            for batch in self._scheduler.plan_prefill():
                self._executor.prefill(batch)
                self._counts["prefill_dispatches"] += 1
                self._counts["prefill_tokens"] += sum(length for _, _, length in batch.items)
                budget -= batch.shape.tokens
                idle = False
            if idle:
                break
            worked = True
        return worked

    def _plan_decode(self) -> list[scheduler.Sequence]:
        members = self._scheduler.plan_decode()
        while members is None or (self._rounds and self._in_step()):
            if self._rounds:  # what is in flight may end some; and a preempted one needs its tokens
                self._read_round()
            else:
                self._scheduler.preempt()
                self._counts["preemptions"] += 1
            members = self._scheduler.plan_decode()
        return members

    def _decode(self, members: list[scheduler.Sequence]) -> None:
        waiting = [sequence for sequence in self._scheduler.running.values() if sequence.waits]
        steps = min(self._most_steps, self._round_steps(members, waiting))
        self._most_steps = min(2 * self._most_steps, self.decode_steps)
        sampled, top, rows = self._executor.decode(members, waiting, steps)
        self._counts["decode_rounds"] += 1
        self._counts["decode_steps"] += steps
        entries = []
        for sequence, row in zip(members, rows, strict=True):
            count = 1 if sequence.stepwise else steps
            entries.append((sequence, row, count + sequence.fresh, sequence.fresh))
            sequence.in_flight += count
            sequence.fresh = False
        self._rounds.append(_Round(entries, sampled, top, self.version))

    def _in_step(self) -> bool:
        """Whether all take one step at a time together, and no round is begun before the last one is read.

        So it is where most wait for the host after each token, for otherwise some of these would sample in one round,
        the rest in the next, and a round takes as long for few as for many.
        """
        prefilled = [s for s in self._scheduler.running.values() if s.computed >= s.target]
        return 3 * sum(sequence.stepwise for sequence in prefilled) > 2 * len(prefilled)

    def _round_steps(self, members: list[scheduler.Sequence], waiting: list[scheduler.Sequence]) -> int:
        """Steps of a round. Who waits for the host after each token gets one in every second round: so rounds become
        shorter as such requests become more, and stay long where one of them is among many others.
        """
        if self._in_step():
            return 1
        stepwise = len(waiting) + sum(sequence.stepwise for sequence in members)
        free = len(members) + len(waiting) - stepwise
        if not stepwise:
            return self.decode_steps
        share = -(-self.decode_steps * free // (free + self.decode_steps * stepwise))
        return min(self.decode_steps, max(2, share))

    # Results ----------------------------------------------------------------------------------------------------------

    def _read_round(self) -> None:
        """Waits for the oldest round and takes in what it sampled."""
        entry = self._rounds.popleft()
        token_bt, logprob_bt = programs.read_sampled(np.asarray(entry.sampled))
        counts = (token_bt[:, 1:] >= 0).sum(axis=1).tolist()
        tokens, logprobs = token_bt.tolist(), logprob_bt.tolist()
        top_btn = None if entry.top is None else programs.read_top(np.asarray(entry.top))
        for sequence, row, in_flight, fresh in entry.members:
            if sequence.done:
                continue
            sequence.in_flight -= in_flight
            sequence.last_policy_version = entry.version
            span = slice(0 if fresh else 1, 1 + counts[row])
            if not np.isfinite(logprob_bt[row, span]).all():
                self._deliver(sequence, "error", "the logits are not finite: the weights have diverged")
                continue
            if sequence.shape is not None and sequence.shape.wants_top:
                sequence.shape.add_top(*(x[row, : counts[row]] for x in top_btn))
            try:
                reason = self._extend(sequence, tokens[row][span], logprobs[row][span])
            except Exception as error:  # in the request's own functions; nobody else's request suffers
                _log.exception("request %s failed", sequence.request.request_id)
                self._deliver(sequence, "error", f"{type(error).__name__}: {error}")
                continue
            if reason is not None:
                self._deliver(sequence, reason)

    def _extend(self, sequence: scheduler.Sequence, tokens: list[int], logprobs: list[float]) -> str | None:
        """Takes in newly sampled tokens; returns the finish reason if they end the reply."""
        request = sequence.request
        sequence.tokens += tokens
        sequence.logprobs += logprobs
        self._counts["generated_tokens"] += len(tokens)
        reason = None
        if sequence.tokens[-1] in sequence.stop_ids:
            reason = "stop"
        elif len(sequence.tokens) >= sequence.limit:
            reason = "length"
        if sequence.shape is not None and reason is None:
            sequence.shape.accept(tokens)
            reason = "stop" if sequence.shape.finished else None
        if request.should_stop is not None:
            keep = request.should_stop(sequence.tokens[sequence.prompt_length :])
            if keep is not None:
                drop = len(sequence.logprobs) - keep
                if drop > 0:
                    del sequence.tokens[-drop:], sequence.logprobs[-drop:]
                    tokens, logprobs = tokens[:-drop], logprobs[:-drop]
                reason = "stop"
        if request.on_top_logprobs is not None and tokens:
            request.on_top_logprobs(sequence.top_logprobs(len(sequence.logprobs) - len(tokens), len(sequence.logprobs)))
        if request.on_tokens is not None and tokens:
            request.on_tokens(tokens, np.asarray(logprobs, np.float32), self._versions(sequence))
        return reason

    def _versions(self, sequence: scheduler.Sequence) -> tuple[int, int]:
        """Of the weights when it was first admitted, or now if it never was, and of those that sampled last."""
        first = self.version if sequence.policy_version is None else sequence.policy_version
        return first, max(first, sequence.last_policy_version)

    def _deliver(self, sequence: scheduler.Sequence, reason: str, error: str | None = None) -> None:
        request = sequence.request
        self._scheduler.finish(sequence)
        with self._lock:
            del self._in_flight[request.request_id]
        self._counts["requests"] += 1
        self._counts["cached_tokens"] += sequence.cached_tokens
        first, last = self._versions(sequence)
        completion = Completion(
            request_id=request.request_id,
            token_ids=sequence.tokens[sequence.prompt_length :],
            logprobs=np.asarray(sequence.logprobs, np.float32),
            finish_reason=reason,
            cached_tokens=sequence.cached_tokens,
            policy_version=first,
            last_policy_version=last,
            error=error,
            top_logprobs=sequence.top_logprobs(0, len(sequence.logprobs)),
            constrained=request.sampling.constrained,
        )
        try:
            request.on_done(completion)
        except Exception:
            _log.exception("on_done of request %s failed", request.request_id)

    def _sequence(self, request: Request) -> scheduler.Sequence:
        """A request as the scheduler and the device want it."""
        sampling, prompt = request.sampling, np.asarray(request.prompt_ids)
        if prompt.size == 0:
            raise ValueError("the prompt is empty")
        if prompt.size >= self.max_seq_len:
            raise ValueError(
                f"the prompt has {prompt.size} tokens; with room for a reply no more than {self.max_seq_len - 1} fit"
            )
        if prompt.min() < 0 or prompt.max() >= self.config.vocab_size:
            raise ValueError(f"a token id of the prompt is outside the vocabulary of {self.config.vocab_size}")
        stop_ids = sampling.stop_ids if sampling.ignore_eos else (*self._eos_ids, *sampling.stop_ids)
        if not all(0 <= index < self.config.vocab_size for index in sampling.stop_ids):
            raise ValueError(f"a stop id is outside the vocabulary of {self.config.vocab_size}")
        if len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"{len(stop_ids)} stop ids, the model's included; at most {MAX_STOP_IDS} may be given")
        shape = None
        if sampling.penalized or sampling.min_tokens or sampling.top_logprobs or sampling.grammar is not None:
            shape = Shape(sampling, request.prompt_ids, stop_ids, self.config.vocab_size)
        return scheduler.Sequence(
            request,
            prompt.tolist(),
            limit=min(prompt.size + sampling.max_tokens, self.max_seq_len),
            stop_ids=stop_ids,
            sampling_columns=programs.sampling_columns(sampling, stop_ids),
            shape=shape,
        )
