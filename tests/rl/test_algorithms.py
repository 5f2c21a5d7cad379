"""From a step's rows to the learner: returns across rows, corrections, and what an update does with the options."""

import dataclasses

import numpy as np
import pytest

from lightning_jax.rl import advantages, algorithms, credit, losses, mismatch, packing
from lightning_jax.rl.learner import Learner, LearnerSettings, Scores
from lightning_jax.rl.trajectory import TokenCall, build_rows

SETTINGS = LearnerSettings(
    learning_rate=1e-3, kl_coef=0.1, entropy_coef=0.02, batch_size=12, max_seq_len=32, min_block_length=32
)


def prepare(settings, rows, return_n, group_n=None):
    group_n = np.zeros(len(return_n), int) if group_n is None else group_n
    return algorithms.prepare(
        settings, algorithms.Step(rows, np.array(return_n), group_n, lambda rows: [], lambda rows: [])
    )


def test_returns_go_back_from_call_to_call_whatever_rows_they_are_in():
    """A rollout that rewrote its history: call 1 is a row of its own, and calls 0 and 2 are one."""
    calls = [
        TokenCall(0, None, [1], [2, 3], [-1.0, -1.0], reward=1.0),
        TokenCall(1, None, [9], [8], [-1.0], reward=4.0),
        TokenCall(2, 0, [1, 2, 3, 4], [5, 6], [-1.0, -1.0], reward=16.0),
    ]
    other = [TokenCall(0, None, [1], [2], [-1.0], reward=0.0)]
    rows = build_rows(calls, 0) + build_rows(other, 1)
    settings = algorithms.AlgorithmSettings(name="reinforce++", gamma=0.5)
    by_token = {}
    for row in prepare(settings, rows, [21.0, 0.0])[0]:
        assert not row.advantage[~row.loss_mask].any()
        by_token |= {(row.rollout_index, token): a for token, a in zip(row.token_ids, row.advantage, strict=True)}
    # In the order 2 3 | 8 | 5 6, each worth its reward and half of what the next one is worth.
    returns = {(0, 6): 16.0, (0, 5): 8.0, (0, 8): 8.0, (0, 3): 5.0, (0, 2): 2.5, (1, 2): 0.0}
    values = np.array(list(returns.values()))
    expected = (values - values.mean()) / values.std(ddof=1)
    np.testing.assert_allclose([by_token[place] for place in returns], expected, rtol=1e-6)


def test_batch_scale_is_the_whole_batchs():
    return_n, group_n = np.array([1.0, 0.0, 5.0, 3.0, np.nan]), np.array([0, 0, 1, 1, 1])
    expected = np.array([0.5, -0.5, 1.0, -1.0, 0.0]) / np.std([1, 0, 5, 3], ddof=1)
    np.testing.assert_allclose(advantages.grpo_advantages(return_n, group_n, scale="batch"), expected, rtol=1e-5)


def test_zero_variance_groups():
    return_n, group_n = np.array([1.0, 1.0, 0.0, 1.0, np.nan, 2.0]), np.array([0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(advantages.zero_variance_groups(return_n, group_n), [1, 1, 0, 0, 1, 1])


@pytest.mark.parametrize(("length", "penalty"), [(80, 0), (85, -0.25), (90, -0.5), (100, -1), (120, -1)])
def test_overlong_penalty_by_hand(length, penalty):
    assert credit.overlong_penalty(length, longest=100, buffer=20) == penalty


@pytest.mark.parametrize(
    ("correction", "expected"),
    [  # ratios 2, 0.5 and 8; the token in between is an observation, and the last one was constrained
        ("token_truncate", [1, 2, 1, 0.5, 4, 1]),
        ("token_mask", [1, 2, 1, 0.5, 0, 1]),
        ("sequence_truncate", [1, 4, 1, 4, 4, 4]),
        ("sequence_mask", [1, 0, 1, 0, 0, 0]),
    ],
)
def test_importance_weights_by_hand(correction, expected):
    calls = [
        TokenCall(0, None, [1], [2], [-3.0]),
        TokenCall(1, 0, [1, 2, 3], [4, 5], [-3.0, -3.0]),
        TokenCall(2, 1, [1, 2, 3, 4, 5], [6], [-9.0], constrained=True),
    ]
    (row,) = build_rows(calls, 0)
    logprob = np.float32([-7, -3 + np.log(2), -7, -3 - np.log(2), -3 + np.log(8), -3])
    np.testing.assert_allclose(mismatch.weights(row, logprob, correction, 4.0), expected, rtol=1e-6)


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS[1:])
def test_aggregations_over_rollouts_do_not_show_micro_batches_or_rows(config, params, rows, advantages, aggregation):
    """Rollout 0 has two rows more, and counts once; the loss is compared with the definition, token by token."""
    extra = build_rows([TokenCall(7, None, [3, 1], [4, 1, 5], [-1.0] * 3), TokenCall(8, None, [9], [2], [-1.0])], 0)
    rows = [*rows, *extra]
    settings = dataclasses.replace(
        SETTINGS, kl_coef=0, entropy_coef=0, loss_aggregation=aggregation, loss_longest=50, loss_mode="gspo"
    )
    of_rollout = {}
    for row in rows:
        of_rollout.setdefault(row.rollout_index, []).extend([-advantages[row.rollout_index]] * row.loss_mask.sum())
    combine = np.mean if aggregation == "seq-mean-token-mean" else np.sum
    expected = np.mean([combine(tokens) for tokens in of_rollout.values()])
    if aggregation == "constant":
        expected /= 50
    norms = []
    for parts in (1, 3):
        learner = Learner(config, params, dataclasses.replace(settings, gradient_accumulation=parts))
        metrics = learner.update(rows, advantages)  # the ratio is 1: the loss is the mean of the advantages
        np.testing.assert_allclose(metrics["policy/loss"], expected, rtol=1e-5)
        norms.append(metrics["policy/grad_norm"])
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)


def test_weights_scale_the_policy_loss_alone(config, params, rows, advantages):
    settings = dataclasses.replace(SETTINGS, kl_coef=0)
    halved = [dataclasses.replace(row, weight=np.full(len(row), 0.5, np.float32)) for row in rows]
    plain, half = (Learner(config, params, settings).update(r, advantages) for r in (rows, halved))
    entropy = 0.02 * plain["policy/entropy"]
    np.testing.assert_allclose(half["policy/loss"] + entropy, 0.5 * (plain["policy/loss"] + entropy), rtol=1e-4)


def test_kl_in_the_reward_is_in_the_returns_of_grpo(config, params, rows):
    """Against the definition: each rollout's return is less by the sum of its tokens' log-ratios."""
    settings = dataclasses.replace(SETTINGS, kl_in_reward=True, learning_rate=0.02)
    learner = Learner(config, params, settings)
    group_n, return_n = np.arange(12) // 4, np.arange(12) % 3.0
    learner.update(rows, np.linspace(-1, 1, 12).astype(np.float32))  # away from the reference
    kl_n = np.zeros(12)
    for row, score in zip(rows, learner.score(rows), strict=True):
        kl_n[row.rollout_index] += (score.logprob - score.reference_logprob)[row.loss_mask].sum(dtype=np.float64)
    assert np.abs(kl_n).max() > 0.01
    chosen = algorithms.AlgorithmSettings(kl_in_reward=True, kl_coef=0.1)
    step = algorithms.Step(rows, return_n, group_n, learner.score, learner.values)
    made, advantage_n = algorithms.prepare(chosen, step)
    expected = advantages.grpo_advantages(return_n - 0.1 * kl_n, group_n)
    np.testing.assert_allclose(advantage_n, expected, rtol=1e-4, atol=1e-5)
    tokens = sum(row.loss_mask.sum() for row in rows)
    assert learner.update(made, advantage_n)["policy/kl"] == pytest.approx(kl_n.sum() / tokens, rel=1e-5)


def test_kl_in_the_reward_is_computed_at_few_shapes(monkeypatch):
    """JAX compiles it for each; rows have all lengths."""
    rng, estimate, shapes = np.random.default_rng(0), losses.kl_divergence, []

    def watched(logprob, reference_logprob, estimator):
        shapes.append(logprob.shape)
        return estimate(logprob, reference_logprob, estimator)

    monkeypatch.setattr(losses, "kl_divergence", watched)
    for lengths in [(3, 8, 1, 30), (17, 2, 25)]:
        calls = [TokenCall(0, None, [1], [2] * n, [-1.0] * n) for n in lengths]
        rows = [row for i, one in enumerate(calls) for row in build_rows([one], i)]
        scores = [Scores(*rng.normal(-1, 0.3, (2, len(row))).astype(np.float32)) for row in rows]
        settings = algorithms.AlgorithmSettings(kl_in_reward=True, kl_coef=0.1, kl_estimator="k3")
        step = algorithms.Step(rows, np.zeros(len(rows)), np.zeros(len(rows), int), lambda rows, s=scores: s, None)
        for row, score in zip(algorithms.prepare(settings, step)[0], scores, strict=True):
            d = score.logprob - score.reference_logprob
            np.testing.assert_allclose(row.kl, np.where(row.loss_mask, np.exp(-d) + d - 1, 0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(row.reward, -0.1 * row.kl, rtol=1e-6)
    assert shapes == [(64,), (64,)]


def test_shares_are_packed_beside_their_tokens(rows):
    shared = [dataclasses.replace(row, share=row.loss_mask / np.float32(row.loss_mask.sum())) for row in rows]
    batch = packing.pack(shared, np.zeros(12, np.float32), 32)
    np.testing.assert_allclose(batch.share_bt.sum(), len(rows), rtol=1e-6)
    assert not batch.share_bt[~batch.loss_mask_bt].any() and batch.weight_bt is None
