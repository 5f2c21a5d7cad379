"""The engine: requests in, completions out, one round of device work at a time.

A round prefills what was admitted, decodes a few tokens for everyone, and only then reads what the round before
sampled, so the device has work while the host thinks. Rows that stop in the middle of a round stop on the device; the
host learns of it one round late and loses nothing but an idle row.
"""

import collections
import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import mesh as mesh_lib
from lightning_jax.model.llama import LlamaConfig, Params
from lightning_jax.sampler import kv_cache, programs, scheduler
from lightning_jax.sampler.request import MAX_STOP_IDS, Completion, QueueFull, Request, SamplingParams, noise_key

__all__ = ["Completion", "Engine", "QueueFull", "Request", "SamplingParams", "noise_key"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Round:
    """A dispatched decode round: who is in which row, and whether the row's first token is news."""

    members: list[tuple[scheduler.Sequence, bool]]
    sampled: jax.Array  # see programs.decode


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
        prefill_chunk: most prompt tokens of one request in one dispatch; a power of two, at least `page_size`.
        dtype: of weights, activations and cache.
        eos_ids: ids that end a reply; the model's own by default.
        max_queue: requests that may wait.
        row_floor: fewest rows that a matrix product gets. XLA's CPU kernels sum in one order for all shapes of at least
            64 rows, and in others below; with 64, what a request samples is the same to the last bit in any company. A
            lower floor is faster when few requests run, and the same up to rounding.
        mesh: shards KV heads over the mesh's "tensor" axis; the weights keep the sharding they come with.
        version: of `params`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Params,
        *,
        max_slots: int = 64,
        page_size: int = 16,
        num_pages: int,
        max_seq_len: int,
        decode_steps: int = 8,
        prefill_chunk: int = 256,
        dtype: jnp.dtype = jnp.float32,
        eos_ids: Sequence[int] | None = None,
        max_queue: int = 4096,
        row_floor: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        version: int = 0,
    ):
        self.config = config
        self.max_seq_len = max_seq_len
        self.max_slots = max_slots
        self.max_queue = max_queue
        self.decode_steps = decode_steps
        self.version = version
        self._eos_ids = tuple(config.eos_ids if eos_ids is None else eos_ids)
        self._dtype = jnp.dtype(dtype)
        self._mesh = mesh
        row_floor = row_floor or (64 if jax.default_backend() == "cpu" else 8)
        prefill_chunk = max(page_size, min(prefill_chunk, _power_of_two(max_seq_len)))
        self._prefill_shapes = _prefill_shapes(prefill_chunk, page_size, max_slots, row_floor)
        self._batch_sizes = _multiples(row_floor, max(row_floor, _power_of_two(max_slots)), 2)
        self._scheduler = scheduler.Scheduler(
            max_slots=max_slots,
            num_pages=num_pages,
            page_size=page_size,
            max_seq_len=max_seq_len,
            decode_steps=decode_steps,
            prefill_shapes=self._prefill_shapes,
        )
        self._table_width = self._scheduler.page_table.shape[1]
        self._table_widths = _multiples(max(1, kv_cache.BLOCK_TOKENS // page_size), self._table_width, 4)
        page_axes = (num_pages, page_size, config.num_kv_heads, config.head_dim), (None, None, "kv_heads", None)
        self._pages = kv_cache.init_pages(config, num_pages, page_size, self._dtype, self._sharding(*page_axes))
        self._state = programs.init_state(max_slots, self._sharding((), ()))
        self._params: Params = {}
        self.publish(params, version)

        self._inbox: collections.deque[scheduler.Sequence] = collections.deque()
        self._cancelled: collections.deque[str] = collections.deque()
        self._lock = threading.Lock()
        self._in_flight: dict[str, scheduler.Sequence] = {}  # every request between submit and on_done
        self._rounds: collections.deque[_Round] = collections.deque()
        self._counts = collections.Counter()

    # Any thread -------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            QueueFull: `max_queue` requests are waiting.
            ValueError: the prompt is empty or leaves no room in the context, or the request id is in use.
        """
        sequence = self._sequence(request)
        with self._lock:
            waiting = len(self._inbox) + self._scheduler.num_waiting
            if waiting >= self.max_queue:
                raise QueueFull(f"{waiting} requests are waiting, and no more than {self.max_queue} may")
            if request.request_id in self._in_flight:
                raise ValueError(f"a request with the id {request.request_id!r} is in flight")
            self._in_flight[request.request_id] = sequence
            self._inbox.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Ends a request in the next round, with what it has sampled; one that is not in flight is left alone."""
        self._cancelled.append(request_id)

    def stats(self) -> dict[str, int]:
        """Counters since the start (tokens, requests, preemptions, rounds) and gauges of this moment."""
        pool = self._scheduler.pool
        names = ("generated_tokens", "prefill_tokens", "cached_tokens", "requests", "preemptions", "decode_rounds")
        return {name: self._counts[name] for name in (*names, "prefill_dispatches")} | {
            "running": len(self._scheduler.running),
            "queue_length": len(self._inbox) + self._scheduler.num_waiting,
            "free_pages": pool.available,
            "cached_pages": pool.cached,
            "num_pages": pool.num_pages,
        }

    # The device thread ------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One round: admit, prefill, decode, deliver what the previous one sampled. False if there is nothing to do."""
        worked = self._take_in()
        worked |= self._prefill()
        members = self._plan_decode()
        if members:
            self._dispatch_decode(members)
        while len(self._rounds) > bool(members):
            self._read_round()
            worked = True
        return worked or bool(members)

    def publish(self, params: Params, version: int) -> None:
        """Gives the next round new weights (stacked, any dtype; copied). Cached prefixes are forgotten.

        Requests that are running continue with the new weights; their completions name the version they began with.
        """
        with self._device():
            self._params = programs.prepare_params(params, self._dtype)
        self.version = version
        self._scheduler.flush()

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles every program that requests can need. `progress(done, total)` is called after each."""
        jobs = [(self._run_prefill, shape) for shape in self._prefill_shapes]
        jobs += [(self._run_decode, (rows, width)) for rows in self._batch_sizes for width in self._table_widths]
        for done, (run, shape) in enumerate(jobs):
            control = np.zeros(self._control_shape(run, shape), np.int32)
            control[:, programs.SLOT] = self.max_slots
            run(control, *shape)
            if progress is not None:
                progress(done + 1, len(jobs))

    def fail_all(self, error: str) -> None:
        """Ends every request with an error; for when the device thread cannot go on."""
        self._take_in()
        for sequence in list(self._in_flight.values()):
            self._deliver(sequence, "error", error)

    # Rounds -----------------------------------------------------------------------------------------------------------

    def _prefill(self) -> bool:
        """Admits and prefills until slots, pages or this round's share of prompt tokens are used up."""
        budget = 4 * max(rows * chunk for rows, chunk in self._prefill_shapes)
        worked = False
        while budget > 0:
            for sequence in self._scheduler.admit(self.version):
                self._counts["cached_tokens"] += sequence.computed
            idle = True
            for batch in self._scheduler.plan_prefill():
                self._dispatch_prefill(batch)
                budget -= batch.rows * batch.chunk
                idle = False
            if idle:
                break
            worked = True
        return worked

    def _plan_decode(self) -> list[scheduler.Sequence]:
        members = self._scheduler.plan_decode()
        while members is None:
            if self._rounds:  # what is in flight may have finished some; and a preempted one needs its tokens
                self._read_round()
            else:
                self._scheduler.preempt()
                self._counts["preemptions"] += 1
            members = self._scheduler.plan_decode()
        return members

    def _dispatch_prefill(self, batch: scheduler.PrefillBatch) -> None:
        width, chunk = programs.STATE_WIDTH, batch.chunk
        control = np.zeros((batch.rows, width + chunk + self._table_width), np.int32)
        control[:, programs.SLOT] = self.max_slots
        for row, (sequence, start, length) in zip(control, batch.items, strict=False):
            if start + length == sequence.target:
                row[programs.SLOT] = sequence.slot
            row[programs.START], row[programs.LENGTH] = start, length
            row[programs.ROOM] = sequence.limit - sequence.target
            row[programs.TOP_K : width] = sequence.sampling_columns
            row[width : width + length] = sequence.tokens[start : start + length]
            row[width + chunk :] = self._scheduler.page_table[sequence.slot]
            self._counts["prefill_tokens"] += length
        self._run_prefill(control, batch.rows, chunk)
        self._counts["prefill_dispatches"] += 1

    def _dispatch_decode(self, members: list[scheduler.Sequence]) -> None:
        rows = next(size for size in self._batch_sizes if size >= len(members))
        longest = max(len(sequence.pages) for sequence in members)
        width = next(width for width in self._table_widths if width >= longest)
        control = np.zeros((rows, 1 + width), np.int32)
        control[:, 0] = self.max_slots
        slots = [sequence.slot for sequence in members]
        control[: len(slots), 0] = slots
        control[: len(slots), 1:] = self._scheduler.page_table[slots, :width]
        sampled = self._run_decode(control, rows, width)
        sampled.copy_to_host_async()
        entry = _Round([(sequence, sequence.fresh) for sequence in members], sampled)
        for sequence in members:
            sequence.in_flight += self.decode_steps
            sequence.fresh = False
        self._rounds.append(entry)
        self._counts["decode_rounds"] += 1

    def _run_prefill(self, control: np.ndarray, rows: int, chunk: int) -> None:
        with self._device():
            self._pages, self._state = programs.prefill(
                self._params, self._pages, self._state, control, config=self.config, chunk=chunk
            )

    def _run_decode(self, control: np.ndarray, rows: int, width: int) -> jax.Array:
        with self._device():
            self._pages, self._state, sampled = programs.decode(
                self._params, self._pages, self._state, control, config=self.config, steps=self.decode_steps
            )
        return sampled

    # Results ----------------------------------------------------------------------------------------------------------

    def _read_round(self) -> None:
        entry = self._rounds.popleft()
        token_bt, logprob_bt = programs.read_sampled(np.asarray(entry.sampled))
        counts = (token_bt[:, 1:] >= 0).sum(axis=1).tolist()
        tokens, logprobs = token_bt.tolist(), logprob_bt.tolist()
        for row, (sequence, fresh) in enumerate(entry.members):
            if sequence.done:
                continue
            sequence.in_flight -= self.decode_steps + fresh
            span = slice(0 if fresh else 1, 1 + counts[row])
            try:
                reason = self._extend(sequence, tokens[row][span], logprobs[row][span])
            except Exception as error:  # of the caller's functions; nobody else's requests suffer
                _log.exception("request %s failed", sequence.request.request_id)
                self._deliver(sequence, "error", f"{type(error).__name__}: {error}")
                continue
            if not np.isfinite(sequence.logprobs[-1:]).all():
                self._deliver(sequence, "error", "the logits are not finite: the weights have diverged")
            elif reason is not None:
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
        if request.should_stop is not None:
            keep = request.should_stop(sequence.tokens[sequence.prompt_length :])
            if keep is not None:
                drop = len(sequence.logprobs) - keep
                if drop > 0:
                    del sequence.tokens[-drop:], sequence.logprobs[-drop:]
                    tokens, logprobs = tokens[:-drop], logprobs[:-drop]
                reason = "stop"
        if request.on_tokens is not None and tokens:
            request.on_tokens(tokens, np.asarray(logprobs, np.float32))
        return reason

    def _deliver(self, sequence: scheduler.Sequence, reason: str, error: str | None = None) -> None:
        request = sequence.request
        self._scheduler.finish(sequence)
        with self._lock:
            del self._in_flight[request.request_id]
        self._counts["requests"] += 1
        completion = Completion(
            request_id=request.request_id,
            token_ids=sequence.tokens[sequence.prompt_length :],
            logprobs=np.asarray(sequence.logprobs, np.float32),
            finish_reason=reason,
            cached_tokens=sequence.cached_tokens,
            policy_version=self.version if sequence.policy_version is None else sequence.policy_version,
            error=error,
        )
        try:
            request.on_done(completion)
        except Exception:
            _log.exception("on_done of request %s failed", request.request_id)

    # Small things -----------------------------------------------------------------------------------------------------

    def _sequence(self, request: Request) -> scheduler.Sequence:
        sampling, length = request.sampling, len(request.prompt_ids)
        if length == 0:
            raise ValueError("the prompt is empty")
        if length >= self.max_seq_len:
            raise ValueError(
                f"the prompt has {length} tokens, and the context of {self.max_seq_len} must hold it and a reply"
            )
        stop_ids = sampling.stop_ids if sampling.ignore_eos else (*self._eos_ids, *sampling.stop_ids)
        if len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(
                f"{len(stop_ids)} stop ids, and no more than {MAX_STOP_IDS} may be given, the model's included"
            )
        columns = np.full(programs.STATE_WIDTH - programs.TOP_K, -1, np.int32)
        first = programs.TOP_K
        columns[0] = min(sampling.top_k, self.config.vocab_size)
        columns[programs.KEY_0 - first : programs.KEY_1 - first + 1] = np.asarray(sampling.noise_key, np.uint32).view(
            np.int32
        )
        columns[programs.TEMPERATURE - first : programs.TOP_P - first + 1] = np.asarray(
            [sampling.temperature, sampling.top_p], np.float32
        ).view(np.int32)
        columns[programs.STOP - first : programs.STOP - first + len(stop_ids)] = stop_ids
        return scheduler.Sequence(
            request,
            list(request.prompt_ids),
            limit=min(length + sampling.max_tokens, self.max_seq_len),
            stop_ids=stop_ids,
            sampling_columns=columns,
        )

    def _take_in(self) -> bool:
        """Moves new requests to the scheduler and ends cancelled ones; True if any was ended."""
        while self._inbox:
            self._scheduler.add(self._inbox.popleft())
        ended = False
        while self._cancelled:
            sequence = self._in_flight.get(self._cancelled.popleft())
            if sequence is not None:
                self._deliver(sequence, "cancelled")
                ended = True
        return ended

    def _control_shape(self, run: Callable, shape: tuple[int, int]) -> tuple[int, int]:
        rows, size = shape
        return rows, 1 + size if run == self._run_decode else programs.STATE_WIDTH + size + self._table_width

    def _device(self) -> Any:
        """Inside it the mesh is current."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _sharding(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.sharding.Sharding | None:
        if self._mesh is None:
            return None
        return jax.sharding.NamedSharding(self._mesh, mesh_lib.partition_spec(self._mesh, shape, axes))


def _prefill_shapes(prefill_chunk: int, page_size: int, max_slots: int, row_floor: int) -> list[tuple[int, int]]:
    """(rows, chunk): for each length of chunk one shape for little work and one for much."""
    shapes = []
    for chunk in _multiples(page_size, prefill_chunk, 4):
        few = max(1, row_floor // chunk)
        many = max(few, min(_power_of_two(max_slots), 4 * prefill_chunk // chunk))
        shapes += sorted({(few, chunk), (many, chunk)})
    return shapes


def _multiples(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... below last, and last."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return [*sizes, last]


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()
