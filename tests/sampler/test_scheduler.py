"""The scheduler against the promises it makes, with a device that only checks what it is asked to do."""

import gc
import weakref

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lightning_jax.sampler.request import Request, SamplingParams
from lightning_jax.sampler.scheduler import PrefillShape, Scheduler, Sequence

PAGE_SIZE, STEPS, MAX_SEQ_LEN = 4, 3, 32


SHAPES = [PrefillShape(2, 4, 4), PrefillShape(16, 4, 32), PrefillShape(2, 8, 8), PrefillShape(8, 8, 32)]


def make(max_slots: int = 4, num_pages: int = 40, prefill_shapes: list[PrefillShape] = SHAPES) -> Scheduler:
    return Scheduler(
        max_slots=max_slots,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_seq_len=MAX_SEQ_LEN,
        decode_steps=STEPS,
        prefill_shapes=prefill_shapes,
    )


def sequence(name: str, prompt: list[int], max_tokens: int = 5, fairness_key: str = "") -> Sequence:
    request = Request(
        name, prompt, SamplingParams(max_tokens=max_tokens), lambda completion: None, fairness_key=fairness_key
    )
    return Sequence(request, list(prompt), limit=min(len(prompt) + max_tokens, MAX_SEQ_LEN))


class Device:
    """Pages that remember which tokens were written where, and slots that sample a fixed continuation."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.written: dict[tuple[int, int], tuple[int, ...]] = {}  # (page, offset) -> the tokens up to there
        self.sampled: dict[str, list[int]] = {}

    def continuation(self, tokens: list[int]) -> int:
        return (sum(tokens) * 7 + len(tokens)) % 3

    def write(self, sequence: Sequence, tokens: list[int], start: int, end: int) -> None:
        """The KV of positions [start, end) is computed from the cache below it and put in the sequence's pages."""
        table = self.scheduler.page_table[sequence.slot]
        for position in range(end):
            page, offset = int(table[position // PAGE_SIZE]), position % PAGE_SIZE
            assert page != 0, "no page for a token"
            if position < start:
                assert self.written.get((page, offset)) == tuple(tokens[: position + 1]), "reads what is not there"
            else:
                others = [
                    s for s in self.scheduler.running.values() if page in s.pages and sequence not in (s, s.leader)
                ]
                assert not others, "writes to a page that another sequence has"
                self.written[page, offset] = tuple(tokens[: position + 1])

    def round(self) -> int:
        """One round of the engine's loop, read at once. Returns how many sequences decoded."""
        self.scheduler.admit(0)
        for batch in self.scheduler.plan_prefill():
            assert 0 < len(batch.items) <= batch.shape.rows
            assert sum(length for _, _, length in batch.items) <= batch.shape.tokens
            for member, start, length in batch.items:
                assert 0 < length <= batch.shape.chunk
                self.write(member, member.tokens, start, start + length)
            for row, member in batch.samples():
                leader, page = batch.items[row][0], member.target // PAGE_SIZE
                if member is not leader:
                    assert member.tokens == leader.tokens
                    for offset in range(member.target % PAGE_SIZE):  # the copy of the page that is not full
                        self.written[member.pages[page], offset] = self.written[leader.pages[page], offset]
        members = self.scheduler.plan_decode()
        while members is None:
            self.scheduler.preempt()
            members = self.scheduler.plan_decode()
        for member in members:
            tokens = list(member.tokens)
            if member.fresh:
                tokens.append(self.continuation(tokens))
                member.fresh = False
            for _ in range(STEPS):
                if len(tokens) < member.limit:
                    self.write(member, tokens, len(tokens) - 1, len(tokens))
                    tokens.append(self.continuation(tokens))
            member.logprobs += [0.0] * (len(tokens) - len(member.tokens))
            member.tokens = tokens
            member.in_flight = 0
            if len(tokens) == member.limit:
                self.sampled[member.request.request_id] = tokens[member.prompt_length :]
                self.scheduler.finish(member)
        return len(members)


def run(device: Device) -> None:
    """Rounds until nothing is left."""
    for _ in range(500):
        device.round()
        if not device.scheduler.running and not device.scheduler.num_waiting:
            return
    raise AssertionError("sequences are left over")


token_lists = st.lists(st.integers(0, 1), min_size=1, max_size=20)  # few symbols: many shared prefixes


@settings(max_examples=150, deadline=None)
@given(
    jobs=st.lists(st.tuples(token_lists, st.integers(1, 20)), min_size=1, max_size=12),
    num_pages=st.integers(8, 30),
    max_slots=st.integers(1, 5),
)
def test_everything_finishes_with_its_own_tokens_whatever_is_shared_or_preempted(jobs, num_pages, max_slots):
    scheduler = make(max_slots, num_pages)
    for i, (prompt, max_tokens) in enumerate(jobs):
        scheduler.add(sequence(str(i), prompt, max_tokens))
    device = Device(scheduler)
    run(device)
    for i, (prompt, max_tokens) in enumerate(jobs):
        tokens = list(prompt)
        while len(tokens) < min(len(prompt) + max_tokens, MAX_SEQ_LEN):
            tokens.append(device.continuation(tokens))
        assert device.sampled[str(i)] == tokens[len(prompt) :]
    assert scheduler.pool.available == num_pages, "pages leak"


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(token_lists, min_size=2, max_size=10),
    ends=st.lists(st.integers(0, 9), max_size=10),
    data=st.data(),
)
def test_cancelling_and_flushing_at_any_time_leaks_nothing(prompts, ends, data):
    scheduler = make(num_pages=20)
    device = Device(scheduler)
    members = [sequence(str(i), prompt, 12) for i, prompt in enumerate(prompts)]
    for member in members:
        scheduler.add(member)
    for end in ends:
        if data.draw(st.booleans()):
            device.round()
        victim = members[end % len(members)]
        if not victim.done:
            scheduler.finish(victim)
        if data.draw(st.booleans()):
            scheduler.flush()
    for _ in range(500):
        device.round()
    assert not scheduler.running and scheduler.num_waiting == 0
    assert scheduler.pool.available == 20


def test_a_group_is_prefilled_once():
    scheduler = make(max_slots=8)
    group = [sequence(str(i), list(range(10))) for i in range(6)]
    for member in group:
        scheduler.add(member)
    assert scheduler.admit(0) == group
    computed = 0
    for _ in range(2):  # 10 tokens in chunks of 8
        for batch in scheduler.plan_prefill():
            computed += sum(length for _, _, length in batch.items)
            sampling = [member for _, member in batch.samples()]
    assert computed == 10
    assert sampling == group
    assert scheduler.plan_decode() == group
    assert len({tuple(member.pages[:2]) for member in group}) == 1, "full pages are shared"
    assert len({member.pages[2] for member in group}) == 6, "the page that is written to is not"


def test_a_prompt_with_another_beginning_in_progress_waits_for_it():
    scheduler = make(max_slots=8)
    first, second = sequence("a", list(range(10))), sequence("b", [*range(8), 99, 98, 97])
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.admit(0) == [first]
    assert scheduler.admit(0) == []
    next(iter(scheduler.plan_prefill()))
    for _ in scheduler.plan_prefill():
        pass
    assert scheduler.admit(0) == [second]
    assert second.cached_tokens == 8


@pytest.mark.parametrize("prompt", [[*range(10)], [*range(8), 99, 98]])
def test_cancelling_the_one_that_others_wait_for_lets_the_next_one_compute(prompt):
    scheduler = make()
    first, second = sequence("a", list(range(10))), sequence("b", prompt)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.admit(policy_version=-1)
    scheduler.finish(first)
    device = Device(scheduler)
    run(device)
    assert len(device.sampled["b"]) == 5
    assert (second.policy_version, second.cached_tokens) == (0, 0), "as of when it was admitted for good"
    assert second.computed == 10 and scheduler.pool.available == 40


def test_what_was_computed_before_being_sent_back_is_not_others_work():
    scheduler = make()
    first, second = sequence("a", [*range(9), 7]), sequence("b", [*range(8), 9, 9, 9, 9, 9])
    for member in (first, second):
        scheduler.add(member)
        scheduler.admit(0)
        for _ in scheduler.plan_prefill():
            pass
    assert scheduler.preempt() is second
    scheduler.admit(1)
    assert (second.policy_version, second.cached_tokens, second.computed) == (1, 8, 12)
    scheduler.preempt()
    scheduler.flush()
    scheduler.admit(2)
    assert (second.policy_version, second.cached_tokens, second.computed) == (2, 0, 0)


def test_waiting_requests_are_admitted_in_turns_of_their_fairness_keys():
    scheduler = make(max_slots=4, num_pages=100)
    for i in range(10):
        scheduler.add(sequence(f"many-{i}", [i, 1, 2], fairness_key="many"))
    for i in range(2):
        scheduler.add(sequence(f"few-{i}", [i, 3, 4], fairness_key="few"))
    admitted = [member.request.request_id for member in scheduler.admit(0)]
    assert admitted == ["many-0", "few-0", "many-1", "few-1"]


def test_who_is_cancelled_while_it_waits_leaves_the_queue_at_once():
    scheduler = make(max_slots=1)
    scheduler.add(sequence("long", [1]))
    (long,) = scheduler.admit(0)
    waiting = [sequence(str(i), [i] * 9, fairness_key=key) for i in range(4) for key in ("", "other")]
    for member in waiting:
        scheduler.add(member)
    assert scheduler.preempt() is long
    left = waiting.pop(3)
    seen = [weakref.ref(member) for member in (long, *waiting)]
    for member in (long, *waiting):
        scheduler.finish(member)
    del member, long, waiting
    gc.collect()
    assert not any(ref() for ref in seen) and scheduler.num_waiting == 1
    assert scheduler.admit(0) == [left] and scheduler.num_waiting == 0


def test_the_youngest_is_preempted_and_comes_back_first_with_its_tokens():
    scheduler = make(max_slots=3, num_pages=12)
    device = Device(scheduler)
    members = [sequence(name, [i] * 9, max_tokens=20) for i, name in enumerate("abc")]
    for member in members:
        scheduler.add(member)
    preempted = []
    original = scheduler.preempt

    def preempt():
        preempted.append(original())
        return preempted[-1]

    scheduler.preempt = preempt
    while not preempted:
        device.round()
    running = list(scheduler.running.values())
    assert preempted[0].admitted_at > max(member.admitted_at for member in running)
    assert preempted[0].logprobs, "it keeps what it has sampled"
    scheduler.add(sequence("later", [7]))
    order = []
    original_finish = scheduler.finish
    scheduler.finish = lambda member: (order.append(member), original_finish(member))
    run(device)
    assert {member.request.request_id for member in order} == {"a", "b", "c", "later"}
    assert preempted[0].admitted_at < max(member.admitted_at for member in order), "it came back before the later one"
    assert members[0].admitted_at == 0, "the oldest is never sent back"


def test_who_is_preempted_before_its_first_token_has_the_version_that_it_begins_with():
    scheduler = make()
    for name in "ab":
        scheduler.add(sequence(name, [ord(name)] * 9))
    scheduler.admit(policy_version=1)
    preempted = scheduler.preempt()
    scheduler.admit(policy_version=2)
    assert {member.policy_version for member in scheduler.running.values()} == {1, 2} and preempted.policy_version == 2


def test_too_few_pages_for_one_sequence_are_refused():
    with pytest.raises(ValueError, match="at least 8 pages"):
        make(num_pages=7)


def test_prefill_joins_short_chunks_to_long_ones_where_rows_are_free():
    scheduler = make(max_slots=4)
    rng = np.random.default_rng(0)
    for i, length in enumerate((8, 7, 6, 2)):
        scheduler.add(sequence(str(i), rng.integers(0, 1000, length).tolist()))
    scheduler.admit(0)
    (batch,) = scheduler.plan_prefill()
    assert (batch.shape, len(batch.items)) == (PrefillShape(8, 8, 32), 4)


def test_prefill_counts_tokens_and_rows_but_not_what_rows_are_padded_with():
    scheduler = make(max_slots=8, num_pages=100, prefill_shapes=[PrefillShape(2, 8, 8), PrefillShape(6, 8, 24)])
    for i, length in enumerate((5, 4, 5, 5, 4, 5)):
        scheduler.add(sequence(str(i), list(range(10 * i, 10 * i + length))))
    scheduler.admit(0)
    first, second = scheduler.plan_prefill()
    assert first.shape.tokens == 24 and [length for _, _, length in first.items] == [5, 4, 5, 5, 4]
    assert second.shape.tokens == 8 and [length for _, _, length in second.items] == [5]


def test_what_is_left_of_a_prompt_takes_a_dispatch_of_its_size():
    scheduler = make(prefill_shapes=[*SHAPES, PrefillShape(2, 32, 32)])
    scheduler.add(sequence("a", list(range(10))))
    scheduler.admit(0)
    shapes, items = zip(*((batch.shape, batch.items) for batch in scheduler.plan_prefill()), strict=True)
    assert shapes == (PrefillShape(2, 8, 8), PrefillShape(2, 4, 4))
    assert [(start, length) for ((_, start, length),) in items] == [(0, 8), (8, 2)]


def test_a_prompt_takes_several_short_rows_where_a_long_one_would_be_mostly_padding():
    scheduler = make(max_slots=4, num_pages=100, prefill_shapes=[PrefillShape(2, 4, 8), PrefillShape(1, 16, 16)])
    scheduler.add(sequence("short", list(range(6))))
    scheduler.add(sequence("long", list(range(100, 113))))
    scheduler.admit(0)
    long, short = scheduler.plan_prefill()
    assert (long.shape.chunk, [(start, length) for _, start, length in long.items]) == (16, [(0, 13)])
    assert (short.shape.chunk, [(start, length) for _, start, length in short.items]) == (4, [(0, 4), (4, 2)])
    assert [row for row, _ in short.samples()] == [1]
    assert len(scheduler.plan_decode()) == 2
