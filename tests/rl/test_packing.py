"""Packing: nothing is lost, nothing is doubled, and shapes are few."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_jax.rl import packing
from lightning_jax.rl.trajectory import Row


def make_row(rng, length, rollout):
    mask = rng.random(length) < 0.5
    return Row(
        token_ids=rng.integers(1, 1000, length).astype(np.int32),
        loss_mask=mask,
        sampler_logprob=np.where(mask, -rng.random(length), 0).astype(np.float32),
        temperature=np.where(mask, 0.5, 1).astype(np.float32),
        rollout_index=rollout,
    )


lengths = st.lists(st.integers(1, 32), min_size=1, max_size=20)


@given(lengths, st.randoms(use_true_random=False))
def test_every_row_is_found_again_whole_and_the_rest_is_padding(lengths, random):
    rng = np.random.default_rng(0)
    rows = [make_row(rng, length, rollout) for rollout, length in enumerate(lengths)]
    advantage_n = rng.normal(size=len(rows)).astype(np.float32)
    shuffled = random.sample(rows, len(rows))
    batch = packing.pack(shuffled, advantage_n, 32)
    jax.tree.map(np.testing.assert_array_equal, batch, packing.pack(rows, advantage_n, 32))

    found = []
    for b in range(batch.token_bt.shape[0]):
        assert batch.segment_bt[b, 0] == 1, "a block without a row"
        for segment in range(1, batch.segment_bt[b].max() + 1):
            (where,) = np.nonzero(batch.segment_bt[b] == segment)
            np.testing.assert_array_equal(where, np.arange(where[0], where[0] + len(where)))
            np.testing.assert_array_equal(batch.position_bt[b, where], np.arange(len(where)))
            found.append(jax.tree.map(lambda x, b=b, where=where: x[b, where], batch))
    assert len(found) == len(rows)
    unfound = list(range(len(rows)))
    for segment in found:
        index = next(i for i in unfound if np.array_equal(segment.token_bt, rows[i].token_ids))
        unfound.remove(index)
        row = rows[index]
        np.testing.assert_array_equal(segment.loss_mask_bt, row.loss_mask)
        np.testing.assert_array_equal(segment.sampler_logprob_bt, row.sampler_logprob)
        np.testing.assert_array_equal(segment.temperature_bt, row.temperature)
        np.testing.assert_array_equal(segment.advantage_bt, np.where(row.loss_mask, advantage_n[index], 0))
    padding = batch.segment_bt == 0
    assert padding.sum() == padding.size - sum(lengths)
    assert not batch.loss_mask_bt[padding].any()


@given(lengths)
def test_first_fit_leaves_at_most_one_block_less_than_half_full(lengths):
    rng = np.random.default_rng(0)
    batch = packing.pack([make_row(rng, n, i) for i, n in enumerate(lengths)], np.zeros(len(lengths), np.float32), 32)
    assert ((batch.segment_bt > 0).sum(axis=1) <= 16).sum() <= 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 10)), min_size=1, max_size=12), st.booleans())
def test_blocks_hold_the_tokens_needed_and_a_block_for_all_holds_no_more(prompts_and_lengths, share):
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 1000, (4, 8)).astype(np.int32)
    rows = []
    for i, (prompt, length) in enumerate(prompts_and_lengths):
        row = make_row(rng, 8 + length, i)
        row.token_ids[:8], row.loss_mask[:] = prompts[prompt], np.arange(8 + length) >= 8
        rows.append(row)

    def held(length):
        batch = packing.pack(rows, np.zeros(len(rows), np.float32), length, share=share)
        return (batch.segment_bt > 0).sum()

    needed = packing.tokens_needed(rows, share=share)
    assert held(32) >= needed and held(18 * len(rows)) == needed


def test_a_row_longer_than_a_block_is_refused():
    with pytest.raises(ValueError, match="33 tokens does not fit a block of 32"):
        packing.pack([make_row(np.random.default_rng(0), 33, 0)], np.zeros(1, np.float32), 32)


def test_block_lengths_are_powers_of_two():
    assert [packing.block_length(n, minimum=64) for n in (1, 64, 65, 128, 129, 4096)] == [64, 64, 128, 128, 256, 4096]


def test_block_lengths_hold_the_longest_row_and_the_rounder_come_first():
    rounder = [512, 2048, 1024, 1536, 768, 1280, 1792]
    assert packing.block_lengths(400, minimum=256) == [*rounder, 640, 896, 1152, 1408, 1664, 1920, 448]
    assert packing.block_lengths(100, minimum=256)[:6] == [256, 1024, 512, 768, 384, 640]
    assert packing.block_lengths(700, minimum=256, unit=512) == [1024, 4096, 2048, 3072, 1536, 2560, 3584]
    assert packing.block_lengths(20, minimum=32) == [32, 128, 64]


def test_micro_batch_sizes_are_few_and_hold_their_share():
    sizes = {n: packing.micro_batch_size(n, 1, limit=10**6) for n in range(1, 1025)}
    assert set(sizes.values()) == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024}
    assert all(n <= size <= max(n + 1, 1.5 * n) for n, size in sizes.items())
    assert packing.micro_batch_size(64, 4, limit=100) == 16
    assert packing.micro_batch_size(64, 1, limit=10) == 8
    assert packing.largest_micro_batch(64, 1, limit=10) == 10
    assert packing.micro_batch_size(5, 1, limit=100, multiple=8) == 8


def test_micro_batches_are_smaller_where_that_leaves_less_padding():
    assert packing.micro_batch_size(38, 4, limit=100) == 8  # five of them hold 40, four of 12 would hold 48
    assert packing.micro_batch_size(38, 1, limit=100) == 48
    assert packing.micro_batch_size(38, 4, limit=100, multiple=12) == 12
    for blocks, parts, limit in itertools.product(range(1, 200), (1, 3, 4, 16), (1, 7, 24, 1000)):
        largest = packing.largest_micro_batch(blocks, parts, limit=limit)
        size = packing.micro_batch_size(blocks, parts, limit=limit)
        assert largest / 2 <= size <= largest and -(-blocks // size) * size <= -(-blocks // largest) * largest


def test_parts_differ_by_one_at_most():
    assert packing.even_parts(10, 8) == [2, 2, 1, 1, 1, 1, 1, 1]
    assert packing.even_parts(8, 4) == [2, 2, 2, 2] and packing.even_parts(3, 8) == [1, 1, 1]


def test_micro_batches_are_the_batch_and_padding():
    rng = np.random.default_rng(0)
    batch = packing.pack([make_row(rng, 30, i) for i in range(7)], np.zeros(7, np.float32), 32)
    parts = packing.micro_batches(batch, 3)
    assert [part.token_bt.shape for part in parts] == [(3, 32)] * 3
    joined = jax.tree.map(lambda *blocks: np.concatenate(blocks), *parts)
    jax.tree.map(lambda whole, original: np.testing.assert_array_equal(whole[:7], original), joined, batch)
    assert not joined.segment_bt[7:].any() and not joined.loss_mask_bt[7:].any()
