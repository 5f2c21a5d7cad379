"""A prompt that rows share is computed once, and nothing else is different: held against the same rows unshared."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.model import attention
from lightning_jax.rl import packing, trajectory, update
from lightning_jax.rl.learner import Learner, LearnerSettings

SETTINGS = LearnerSettings(kl_coef=0.1, entropy_coef=0.02, batch_size=12, max_seq_len=64, min_block_length=64)


@pytest.fixture(scope="module")
def grouped(config) -> list[trajectory.Row]:
    """Three groups of four: prompts of 20, 7 and 1 tokens; ragged replies, some of two turns."""
    rng = np.random.default_rng(4)
    rows = []
    for group, length in enumerate((20, 7, 1)):
        shared = rng.integers(config.vocab_size, size=length).tolist()
        for rollout in range(4 * group, 4 * group + 4):
            calls, prompt = [], shared
            for turn in range(1 + rollout % 2):
                sampled = rng.integers(config.vocab_size, size=rng.integers(1, 8)).tolist()
                logprobs = -rng.random(len(sampled)).astype(np.float32)
                parent = turn - 1 if turn else None
                calls.append(trajectory.TokenCall(turn, parent, prompt, sampled, logprobs, temperature=0.7 + group / 3))
                prompt = prompt + sampled + rng.integers(config.vocab_size, size=3).tolist()
            rows += trajectory.build_rows(calls, rollout)
    return rows


def totals(config, params, blocks, size, settings=SETTINGS):
    reference = jax.tree.map(lambda x: 0.98 * x, params)
    total, num_tokens = update.zero_totals(params), np.float32(blocks.loss_mask_bt.sum())
    for batch in packing.micro_batches(blocks, size):
        total = update.accumulate(total, params, reference, batch, num_tokens, config=config, settings=settings)
    return total


def assert_equal(actual, expected):
    """To 1e-5 of each array's largest number."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * max(1e-2, np.abs(e).max())),
        jax.device_get(actual),
        jax.device_get(expected),
    )


@pytest.mark.parametrize(
    "length, window, loss_mode", [(64, None, "clip"), (64, 6, "clip"), (64, None, "gspo"), (192, None, "clip")]
)
def test_gradients_and_sums_are_those_of_unshared_rows(config, params, grouped, advantages, length, window, loss_mode):
    """In blocks of 192 each query meets half of the keys alone."""
    config = dataclasses.replace(config, sliding_window=window)
    settings = dataclasses.replace(SETTINGS, loss_mode=loss_mode)
    shared = packing.pack(grouped, advantages, length, share=True)
    plain = packing.pack(grouped, advantages, 64)
    assert plain.reach is None and (shared.reach is not None) == (length == 192)
    assert (shared.segment_bt > 0).sum() == sum(map(len, grouped)) - 3 * 19 - 3 * 6
    assert shared.loss_mask_bt.sum() == plain.loss_mask_bt.sum()
    expected = totals(config, params, plain, plain.token_bt.shape[0], settings)
    assert_equal(totals(config, params, shared, shared.token_bt.shape[0], settings), expected)
    if loss_mode == "clip":
        assert_equal(totals(config, params, shared, 2, settings), expected)  # the last micro-batch is filled up


def test_a_prefix_is_repeated_in_each_block_that_needs_it(config, params, grouped, advantages):
    """Blocks of 40 do not hold the whole first group; in no order of the rows do they differ."""
    shared, plain = (packing.pack(grouped, advantages, 40, share=share) for share in (True, False))
    again = packing.pack(grouped[::-1], advantages, 40, share=True)
    jax.tree.map(np.testing.assert_array_equal, shared, again)
    assert shared.token_bt.shape[0] < plain.token_bt.shape[0]
    assert_equal(totals(config, params, shared, 1), totals(config, params, plain, 1))


def test_a_learner_shares_and_its_scores_are_each_rows_own(config, params, grouped, advantages):
    learner = Learner(config, params, SETTINGS)
    for row, score in zip(grouped, learner.score(grouped), strict=True):
        block = packing.pack([row], advantages, 64)
        expected_bt, _ = update.policy_logprobs(params, block, config=config, settings=SETTINGS)
        mask = row.loss_mask
        np.testing.assert_allclose(score.logprob[mask], expected_bt[0, : len(row)][mask], rtol=1e-5, atol=1e-5)
    metrics = learner.update(grouped, advantages)
    places = sum(batch.token_bt.size for batch in learner._divide(grouped, advantages)[0])
    filled = sum(map(len, grouped)) - 3 * 19 - 3 * 6
    np.testing.assert_allclose(metrics["train/padding_fraction"], 1 - filled / places, rtol=1e-6)
    assert metrics["train/tokens"] == filled


def test_cudnns_call_sees_the_same(config, grouped, advantages):
    """Its mask, with the computation by XLA; the plain path has positions, it has places in the row."""
    shared = packing.pack(grouped, advantages, 64, share=True)
    b, t = shared.token_bt.shape
    rng = np.random.default_rng(5)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((b, t, 2, 2, 8), *((b, t, 2, 8),) * 2))
    plain = attention.segment_attention(shared.segment_bt, shared.position_bt, None, shared.prefix_bt)
    cudnn = functools.partial(attention.cudnn_attention, prefix_bt=shared.prefix_bt, implementation="xla")
    filled = shared.segment_bt > 0
    actual = cudnn(q, k, v, jnp.asarray(shared.segment_bt), None)
    np.testing.assert_allclose(actual[filled], plain(q, k, v, None)[0][filled], rtol=1e-5, atol=1e-5)


def rows_in_turn(rng) -> list[trajectory.Row]:
    """Two prompts whose rows come in turn, as of agents with two calls; one of a group by itself; and rows alone."""
    prompts = [rng.integers(99, size=n) for n in rng.integers(1, 90, size=3)]
    rows = []
    for rollout in range(12):
        of_rollout = [prompts[2]] if rollout >= 8 else [*prompts[:2], rng.integers(99, size=rng.integers(1, 40))]
        for prompt in of_rollout:
            token_t = np.r_[prompt, rng.integers(99, size=rng.integers(1, 60))].astype(np.int32)
            mask_t = np.arange(len(token_t)) >= len(prompt)
            zeros_t, ones_t = np.zeros(len(token_t), np.float32), np.ones(len(token_t), np.float32)
            rows.append(trajectory.Row(token_t, mask_t, zeros_t, ones_t, rollout))
    return rows


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share, window", [(True, None), (True, 30), (False, None)])
def test_each_block_of_queries_has_all_the_keys_that_they_see(seed, share, window):
    """What is computed with near keys alone, forward and backward, against all keys of the row."""
    rng = np.random.default_rng(seed)
    batch = packing.pack(rows_in_turn(rng), np.zeros(12, np.float32), 384, share=share)
    assert batch.reach is not None and batch.reach.keys <= 0.75 * 384
    b, t = batch.token_bt.shape
    shapes = (b, t, 2, 2, 8), (b, t, 2, 8), (b, t, 2, 8)
    qkv, weight = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes], rng.normal(size=shapes[0])
    weight *= (batch.segment_bt > 0)[..., None, None, None]

    def weighted(batch):
        return jax.jit(jax.value_and_grad(lambda qkv: (batch.attend(window)(*qkv, None)[0] * weight).sum()))(qkv)

    actual, expected = weighted(batch), weighted(batch.replace(reach=None))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4), actual, expected)
