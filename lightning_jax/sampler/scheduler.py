"""Who runs next: admission, pages, prefix reuse, preemption. No JAX here.

A request's life: it waits; it is admitted to a slot with pages for its prompt, minus the prefix that others have
computed; its prompt is prefilled in chunks; it decodes a few tokens a round; it finishes. When pages run out, the one
admitted last goes back to the queue with the tokens it has, and later prefills prompt and tokens again. A request whose
whole prompt is that of one still being prefilled (a group of samples of one task) follows it: it computes nothing, and
begins to sample where its leader does.

The device runs programs in the order of their dispatch, and the scheduler thinks in that order: a page counts as filled
as soon as the program that fills it has been dispatched, and a released page may be given away although a program in
flight still writes to it, because whatever reads it next comes later.
"""

import dataclasses
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lightning_jax.sampler.pages import ROOT, Node, PagePool
from lightning_jax.sampler.request import Request
from lightning_jax.sampler.shaping import Shape


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request and how far it has come.

    Attributes:
        tokens: prompt and sampled ids known to the host.
        logprobs: one for each sampled id.
        limit: `tokens` never grows longer than this.
        stop_ids: ids that end it.
        sampling_columns: [n] int32, what the device needs to know of its sampling parameters.
        queue: the fairness key under which it waits; None for those that were sent back, who come first.
        slot: row of the device's slot state; None while it waits.
        pages: its KV pages in order.
        target: tokens to prefill before it decodes: all it had when it was admitted, but the last of them where it has
            a shape. The prefill samples the next token, and a shape's first is a decode round's.
        computed: tokens of them whose prefill has been dispatched.
        cached_tokens: prompt tokens that it did not have to compute when it was first admitted.
        in_flight: tokens that dispatched programs sample (at most) and the host has not read yet.
        fresh: the token that its prefill samples is in flight, and no decode round has been dispatched since.
        admitted_at: a counter; the highest is preempted first.
        leader: the sequence whose prefill this one waits for, and whose full pages it shares.
        policy_version, last_policy_version: of the weights when it was first admitted, and of those that sampled last.
        followers: those that wait for this one.
        shape: what it wants of the distribution it samples from, where that is not the model's own.
    """

    request: Request
    tokens: list[int]
    limit: int
    stop_ids: tuple[int, ...] = ()
    sampling_columns: np.ndarray | None = None
    shape: Shape | None = None
    logprobs: list[float] = dataclasses.field(default_factory=list)
    queue: str | None = None
    slot: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    target: int = 0
    computed: int = 0
    in_flight: int = 0
    fresh: bool = False
    admitted_at: int = 0
    epoch: int = -1
    policy_version: int | None = None
    last_policy_version: int = 0
    cached_tokens: int = 0
    done: bool = False
    node_ids: list[int] = dataclasses.field(default_factory=list)
    leader: "Sequence | None" = None
    followers: list["Sequence"] = dataclasses.field(default_factory=list)
    unfilled: deque[tuple[int, Node]] = dataclasses.field(default_factory=deque)

    @property
    def prompt_length(self) -> int:
        return len(self.tokens) - len(self.logprobs)

    @property
    def exhausted(self) -> bool:
        """What is in flight already reaches the limit."""
        return len(self.tokens) + self.in_flight >= self.limit

    @property
    def stepwise(self) -> bool:
        """A round samples one token of it, see `Shape.stepwise`."""
        return self.shape is not None and self.shape.stepwise

    @property
    def waits(self) -> bool:
        """Its next token cannot be sampled before the host has seen the one in flight."""
        return self.in_flight > 0 and self.stepwise

    def top_logprobs(self, first: int, last: int) -> list[list[tuple[int, float]]] | None:
        """The likeliest tokens in place of some of the sampled ones; None if the request did not ask."""
        wanted = self.shape is not None and self.shape.wants_top
        return self.shape.top_logprobs[first:last] if wanted else None

    def contents(self) -> bytes:
        """What is to be prefilled, to compare with others'."""
        return np.asarray(self.tokens[: self.target], np.int32).tobytes()


class PrefillShape(NamedTuple):
    """What a prefill dispatch has room for: `rows` pieces of up to `chunk` tokens each, `tokens` in all."""

    rows: int
    chunk: int
    tokens: int

    def fits(self, items: "list[tuple[Sequence, int, int]]") -> bool:
        """Whether these pieces may be one dispatch's, see `PrefillBatch.items`."""
        return len(items) <= self.rows and sum(length for _, _, length in items) <= self.tokens


@dataclasses.dataclass(frozen=True)
class PrefillBatch:
    """One prefill dispatch.

    Attributes:
        items: (sequence, first token, number of tokens). A sequence may have several rows, one after the other: the
            device writes the keys of all rows before any of them attends.
    """

    shape: PrefillShape
    items: list[tuple[Sequence, int, int]]

    def samples(self) -> Iterator[tuple[int, Sequence]]:
        """(row, sequence) for each sequence whose prompt is complete with this dispatch."""
        for row, (sequence, start, length) in enumerate(self.items):
            if start + length == sequence.target:
                yield row, sequence
                for follower in sequence.followers:
                    yield row, follower


class Scheduler:
    """Decides what each round computes; the engine computes it.

    Args:
        max_slots: sequences that run at once.
        num_pages, page_size: the KV pool.
        max_seq_len: longest sequence, prompt and sampled tokens together.
        decode_steps: tokens a decode round samples.
        prefill_shapes: those that a prefill may have.
    """

    def __init__(
        self,
        *,
        max_slots: int,
        num_pages: int,
        page_size: int,
        max_seq_len: int,
        decode_steps: int,
        prefill_shapes: list[PrefillShape],
    ):
        pages_per_sequence = -(-max_seq_len // page_size)
        if num_pages < pages_per_sequence:
            raise ValueError(
                f"{num_pages} pages of {page_size} tokens cannot hold one sequence of {max_seq_len} tokens; "
                f"at least {pages_per_sequence} pages are needed"
            )
        self.page_size = page_size
        self.max_seq_len = max_seq_len
        self.decode_steps = decode_steps
        self.pool = PagePool(num_pages, page_size)
        self.page_table = np.zeros((max_slots, pages_per_sequence), np.int32)
        self.running: dict[int, Sequence] = {}  # by slot
        self.epoch = 0
        self._prefill_shapes = sorted(prefill_shapes, key=lambda shape: (shape.tokens, shape.rows))
        self._chunks = sorted({shape.chunk for shape in prefill_shapes})
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._waiting: OrderedDict[str | None, OrderedDict[Sequence, None]] = OrderedDict()  # by `Sequence.queue`
        self._leaders: dict[bytes, Sequence] = {}  # by their tokens, those whose prefill is not complete
        self._num_waiting = 0
        self._counter = itertools.count()

    # Waiting ----------------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence behind those of its fairness key."""
        sequence.queue = sequence.request.fairness_key
        self._waiting.setdefault(sequence.queue, OrderedDict())[sequence] = None
        self._num_waiting += 1

    def _put_first(self, sequence: Sequence) -> None:
        self._waiting.setdefault(sequence.queue, OrderedDict())[sequence] = None
        self._waiting[sequence.queue].move_to_end(sequence, last=False)
        self._waiting.move_to_end(sequence.queue, last=False)
        self._num_waiting += 1

    def _take_out(self, sequence: Sequence) -> None:
        del self._waiting[sequence.queue][sequence]
        if not self._waiting[sequence.queue]:
            del self._waiting[sequence.queue]
        self._num_waiting -= 1

    def admit(self, policy_version: int) -> list[Sequence]:
        """Gives slots and pages to waiting sequences: preempted ones first, then one of each fairness key in turn.

        A sequence whose prefix another one is about to compute is passed over until that prefill is dispatched.
        """
        admitted, deferred = [], []
        while self._free_slots and self._waiting:
            sequence = next(iter(next(iter(self._waiting.values()))))
            outcome = self._try_admit(sequence, policy_version)
            if outcome == "no pages":
                break
            if outcome == "admitted" and sequence.queue is not None:
                self._waiting.move_to_end(sequence.queue)
            self._take_out(sequence)
            (admitted if outcome == "admitted" else deferred).append(sequence)
        for sequence in reversed(deferred):
            self._put_first(sequence)
        return admitted

    def _try_admit(self, sequence: Sequence, policy_version: int) -> str:
        size, length = self.page_size, len(sequence.tokens) - (sequence.shape is not None)
        sequence.target = length
        contents = sequence.contents()
        leader = self._leaders.get(contents)
        if leader is not None and leader.epoch == self.epoch:
            return self._try_follow(sequence, leader, policy_version)
        pages, node_ids, parent = [], [], ROOT
        # The last token is always computed where its logits are needed.
        for i in range(length // size if sequence.shape is not None else (length - 1) // size):
            node = self.pool.lookup(parent, contents[4 * size * i : 4 * size * (i + 1)])
            if node is None:
                break
            if not node.ready:
                return "deferred"
            pages.append(node.page)
            node_ids.append(node.node_id)
            parent = node.node_id
        if not self._start(sequence, pages, len(pages) * size, policy_version):
            return "no pages"
        sequence.node_ids = node_ids
        for i in range(len(node_ids), length // size):
            node = self._insert(sequence, i, contents, ready=False)
            if node.page == sequence.pages[i]:
                sequence.unfilled.append(((i + 1) * size, node))
        if sequence.computed < length:
            self._leaders[contents] = sequence
        return "admitted"

    def _try_follow(self, sequence: Sequence, leader: Sequence, policy_version: int) -> str:
        num_full = leader.target // self.page_size
        if not self._start(sequence, leader.pages[:num_full], leader.target, policy_version):
            return "no pages"
        sequence.computed = 0  # not before the leader's prefill is dispatched
        sequence.node_ids = leader.node_ids[:num_full]
        sequence.leader = leader
        leader.followers.append(sequence)
        return "admitted"

    def _start(self, sequence: Sequence, shared: list[int], num_cached: int, policy_version: int) -> bool:
        """Gives a sequence a slot, and pages of its own after those it shares; False if there are too few."""
        for page in shared:
            self.pool.retain(page)
        new = None
        count = self._pages_for(self._after_round(sequence, len(sequence.tokens) + 1)) - len(shared)
        # A page for each running sequence stays free, or they would be preempted for the newcomer at once.
        if self.pool.available >= count + len(self.running):
            new = self.pool.allocate(count)
        if new is None:
            self.pool.release(shared)
            return False
        slot = self._free_slots.pop()
        self.running[slot] = sequence
        sequence.slot = slot
        sequence.pages = [*shared, *new]
        if sequence.policy_version is None:
            sequence.policy_version = policy_version
            if sequence.computed <= sequence.cached_tokens or sequence.epoch != self.epoch:  # else it finds its own
                sequence.cached_tokens = num_cached
        sequence.computed = num_cached
        sequence.admitted_at = next(self._counter)
        sequence.epoch = self.epoch
        if sequence.shape is not None:
            sequence.shape.placed = False
        self.page_table[slot] = 0
        self.page_table[slot, : len(sequence.pages)] = sequence.pages
        return True

    # Rounds -----------------------------------------------------------------------------------------------------------

    def plan_prefill(self) -> Iterator[PrefillBatch]:
        """Dispatches that bring every sequence that is still prefilling one chunk further, the longest chunk.

        The caller dispatches each batch before it asks for the next; that is when its pages count as filled.
        """
        todo: dict[int, list[Sequence]] = {chunk: [] for chunk in self._chunks}
        for sequence in self.running.values():
            left = sequence.target - sequence.computed
            if left > 0 and sequence.leader is None:
                todo[_chunk_for(left, self._chunks)].append(sequence)
        for chunk in reversed(self._chunks):
            items = self._pieces(todo[chunk], chunk)
            while items:
                shape = self._shape_for(items, chunk)
                ends = itertools.accumulate(length for _, _, length in items)
                count = min(shape.rows, sum(end <= shape.tokens for end in ends))
                members, items = items[:count], items[count:]
                for shorter in self._chunks[: self._chunks.index(chunk)]:  # room left over saves dispatches
                    more = self._pieces(todo[shorter], shape.chunk)
                    if shape.fits(members + more):
                        members += more
                        todo[shorter] = []
                batch = PrefillBatch(shape, members)
                yield batch
                for sequence, start, length in batch.items:
                    self._prefilled(sequence, start + length)

    def _pieces(self, sequences: list[Sequence], chunk: int) -> list[tuple[Sequence, int, int]]:
        """What one plan computes of these sequences, in rows of `chunk` tokens, as `PrefillBatch.items`."""
        pieces = []
        for sequence in sequences:
            end = min(sequence.target, sequence.computed + self._chunks[-1])
            pieces += [(sequence, start, min(chunk, end - start)) for start in range(sequence.computed, end, chunk)]
        return pieces

    def _shape_for(self, items: list[tuple[Sequence, int, int]], chunk: int) -> PrefillShape:
        """The next dispatch's for these pieces, no longer than `chunk`: few full ones rather than one half empty."""
        longest = max(length for _, _, length in items)
        shapes = [shape for shape in self._prefill_shapes if longest <= shape.chunk <= chunk]
        enough = next((shape for shape in shapes if shape.fits(items)), None)
        if enough is None:
            return shapes[-1]
        half = PrefillShape(enough.rows // 2, enough.chunk, enough.tokens // 2)
        smaller = [shape for shape in shapes if shape.tokens < enough.tokens]
        return smaller[-1] if smaller and half.fits(items) else enough

    def _prefilled(self, sequence: Sequence, upto: int) -> None:
        sequence.computed = upto
        while sequence.unfilled and sequence.unfilled[0][0] <= upto:
            sequence.unfilled.popleft()[1].ready = True
        if upto == sequence.target:
            self._forget_leader(sequence)
            for member in (sequence, *sequence.followers):
                member.computed, member.leader = upto, None
                if member.shape is None:
                    member.in_flight, member.fresh = 1, True
            sequence.followers = []

    def plan_decode(self) -> list[Sequence] | None:
        """The sequences of the next decode round, each with pages for it; None if there are not enough pages."""
        members = []
        for sequence in self.running.values():
            exhausted = sequence.exhausted and not sequence.fresh
            if sequence.computed < sequence.target or exhausted or sequence.waits:
                continue
            count = self._pages_for(self._after_round(sequence, len(sequence.tokens) + sequence.in_flight))
            missing = count - len(sequence.pages)
            if missing > 0:
                pages = self.pool.allocate(missing)
                if pages is None:
                    return None
                self.page_table[sequence.slot, len(sequence.pages) : count] = pages
                sequence.pages += pages
            members.append(sequence)
        return members

    def preempt(self) -> Sequence:
        """Sends the sequence that was admitted last back to the queue. Nothing of it may be in flight."""
        sequence = max(self.running.values(), key=lambda s: s.admitted_at)
        self._send_back(sequence)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is. What it computed stays in the prefix cache."""
        sequence.done = True
        if sequence.slot is not None:
            self._release(sequence)
        else:
            self._take_out(sequence)

    def flush(self) -> None:
        """Forgets all cached prefixes: the weights have changed. Running sequences go on with what they have."""
        self.epoch += 1
        self.pool.flush()

    def _send_back(self, sequence: Sequence) -> None:
        self._release(sequence)
        if not sequence.logprobs:  # it has nothing of what it was admitted for
            sequence.policy_version = None
            sequence.cached_tokens = min(sequence.cached_tokens, sequence.computed)
        sequence.queue = None
        self._put_first(sequence)

    def _release(self, sequence: Sequence) -> None:
        while sequence.followers:
            self._send_back(sequence.followers[-1])
        if sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
            sequence.leader = None
        elif sequence.computed < sequence.target:
            self._forget_leader(sequence)
        for _, node in sequence.unfilled:
            self.pool.discard(node)
        sequence.unfilled.clear()
        if sequence.epoch == self.epoch:
            self._remember(sequence)
        self.pool.release(sequence.pages)
        del self.running[sequence.slot]
        self._free_slots.append(sequence.slot)
        sequence.pages, sequence.node_ids, sequence.slot = [], [], None
        sequence.in_flight, sequence.fresh = 0, False

    def _forget_leader(self, sequence: Sequence) -> None:
        contents = sequence.contents()
        if self._leaders.get(contents) is sequence:
            del self._leaders[contents]

    def _remember(self, sequence: Sequence) -> None:
        """Adds the full pages of sampled tokens to the prefix tree. The newest token is not in the cache yet."""
        filled = sequence.computed
        if filled >= sequence.target:
            filled = min(max(sequence.target, len(sequence.tokens) - 1), len(sequence.tokens))
        contents = np.asarray(sequence.tokens, np.int32).tobytes()
        for i in range(len(sequence.node_ids), filled // self.page_size):
            self._insert(sequence, i, contents, ready=True)

    def _insert(self, sequence: Sequence, i: int, contents: bytes, *, ready: bool) -> Node:
        parent = sequence.node_ids[-1] if sequence.node_ids else ROOT
        tokens = contents[4 * self.page_size * i : 4 * self.page_size * (i + 1)]
        node = self.pool.insert(parent, tokens, sequence.pages[i], ready=ready)
        sequence.node_ids.append(node.node_id)
        return node

    def _after_round(self, sequence: Sequence, length: int) -> int:
        """Tokens in the cache after a decode round that begins with `length` tokens, the newest of them not cached."""
        return min(length - 1 + self.decode_steps, sequence.limit - 1)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)


def _chunk_for(left: int, chunks: list[int]) -> int:
    """Tokens of a row for a sequence that has `left` to prefill: the most with which its rows are half full."""
    return max((chunk for chunk in chunks if -(-left // chunk) * chunk <= 2 * left), default=chunks[0])
