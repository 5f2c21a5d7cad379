"""Values and gradients of advantages, losses, KL and aggregations against verl 0.9.1 (`verl_reference.py`).

Three differences are meant: a group of one has advantage 0 here and its raw return there; a rollout that failed has no
part in its group's mean here and counts as 0 there; and where a rollout has several rows, all have its one advantage.
"""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.rl import advantages, algorithms, losses
from lightning_jax.rl.learner import Scores
from lightning_jax.rl.trajectory import Row

_spec = importlib.util.spec_from_file_location("verl_reference", Path(__file__).with_name("verl_reference.py"))
verl_reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(verl_reference)

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def goldens():
    return dict(np.load(verl_reference.GOLDENS))


@pytest.fixture(scope="module")
def case():
    return verl_reference.case()


@pytest.mark.skipif(not verl_reference.is_installed(), reason="verl or torch is not installed")
def test_goldens_are_what_verl_says(goldens):
    live = verl_reference.expected()
    assert live.keys() == goldens.keys()
    for name, value in live.items():
        np.testing.assert_allclose(value, goldens[name], **TOLERANCE, err_msg=name)
    assert "verl" not in sys.modules, "its stand-ins are for its own functions"


@pytest.mark.parametrize("weighted", ["", "/weighted"])
@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
@pytest.mark.parametrize("name", verl_reference.LOSSES)
def test_losses_and_their_gradients(goldens, case, name, aggregation, weighted):
    """In micro-batches of one, three and nine rollouts, which add up to the whole."""
    mask_nt = case["mask"]
    share_nt = (mask_nt / np.maximum(mask_nt.sum(1, keepdims=True), 1)).astype(np.float32)
    divisor = np.float32(losses.divisor(aggregation, mask_nt, share_nt, verl_reference.LONGEST))

    @jax.jit
    def loss(logprob_nt, part):
        return losses.grpo_loss(
            logprob_nt,
            part["old_logprob"],
            None,
            jnp.zeros_like(logprob_nt),
            part["advantage"],
            part["mask"],
            divisor,
            clip_low=verl_reference.CLIP_LOW,
            clip_high=verl_reference.CLIP_HIGH,
            kl_coef=0.0,
            entropy_coef=0.0,
            loss_mode="clip" if name == "dual" else name,
            dual_clip=verl_reference.DUAL_CLIP if name == "dual" else None,
            segment_bt=jnp.ones(logprob_nt.shape, jnp.int32),
            weight_bt=part["weight"] if weighted else None,
            share_bt=part["share"] if aggregation == "seq-mean-token-mean" else None,
        )[0]

    arrays = {k: x for k, x in case.items() if k != "group"} | {"share": share_nt}
    value, total = 0.0, np.zeros(mask_nt.shape)
    for rows in np.split(np.arange(len(mask_nt)), [1, 4]):
        is_in_part = np.isin(np.arange(len(mask_nt)), rows)
        part = arrays | {"mask": mask_nt & is_in_part[:, None]}  # of one shape, to compile once
        of_part, gradient = jax.value_and_grad(loss)(part["logprob"], part)
        value += float(of_part)
        total += gradient
    np.testing.assert_allclose(value, goldens[f"loss/{name}/{aggregation}{weighted}"], **TOLERANCE)
    expected = goldens[f"gradient/{name}/{aggregation}{weighted}"]
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(total, expected, **TOLERANCE)


def test_gspo_tells_the_rows_of_a_block_apart(case):
    """Two rows side by side, and padding behind them, have the losses and gradients of each alone."""
    rows = [0, 2]
    t = case["mask"].shape[1]

    def gradient(names, segment_bt):
        def loss(logprob_bt):
            lp_bt = jnp.where(names["mask"], logprob_bt, 0.0)
            old_bt = jnp.where(names["mask"], names["old_logprob"], 0.0)
            compared_bt = losses.sequence_logprobs(lp_bt, old_bt, names["mask"], segment_bt)
            of_bt, _, _ = losses.clipped_surrogate(
                compared_bt, old_bt, names["advantage"], clip_low=0.2, clip_high=0.28
            )
            return jnp.sum(jnp.where(names["mask"], of_bt, 0.0))

        return jax.value_and_grad(loss)(names["logprob"])

    names = ("logprob", "old_logprob", "advantage", "mask")
    block = {k: np.concatenate([*case[k][rows], np.zeros(5, case[k].dtype)])[None] for k in names}
    segment_bt = np.repeat([1, 2, 0], [t, t, 5])[None].astype(np.int32)
    together, gradient_bt = gradient(block, segment_bt)
    alone = [gradient({k: case[k][[i]] for k in names}, np.ones((1, t), np.int32)) for i in rows]
    np.testing.assert_allclose(together, sum(value for value, _ in alone), rtol=1e-5)
    expected = np.concatenate([np.asarray(g)[0] for _, g in alone] + [np.zeros(5)])
    np.testing.assert_allclose(gradient_bt[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", verl_reference.KL_ESTIMATORS)
def test_kl_estimators_and_their_gradients(goldens, case, estimator):
    def weighted(logprob_nt):
        kl_nt = losses.kl_divergence(logprob_nt, case["reference_logprob"], estimator)
        return jnp.sum(kl_nt * case["advantage"] * case["mask"]), kl_nt

    gradient_nt, kl_nt = jax.grad(weighted, has_aux=True)(jnp.asarray(case["logprob"]))
    np.testing.assert_allclose(kl_nt, goldens[f"kl/{estimator}"], **TOLERANCE)
    np.testing.assert_allclose(gradient_nt, goldens[f"kl_gradient/{estimator}"], **TOLERANCE)


def prepared(case, name, estimator, gamma=verl_reference.GAMMA):
    """[N, T] advantages of the case by way of rows."""
    mask_nt, zeros_t = case["mask"], np.zeros(case["mask"].shape[1], np.float32)
    rows = [
        Row(
            token_ids=zeros_t.astype(np.int32),
            loss_mask=mask_nt[n],
            sampler_logprob=zeros_t,
            temperature=zeros_t + 1,
            rollout_index=n,
            call=np.where(mask_nt[n], 0, -1),
            reward=case["reward"][n],
        )
        for n in range(len(mask_nt))
    ]

    def score(rows):
        return [Scores(case["old_logprob"][r.rollout_index], case["reference_logprob"][r.rollout_index]) for r in rows]

    settings = algorithms.AlgorithmSettings(
        name=name.removesuffix("-none"),
        scale_rewards="none" if name.endswith("-none") else "group",
        gamma=gamma,
        kl_coef=verl_reference.KL_COEF,
        kl_in_reward=estimator is not None,
        kl_estimator=estimator or "k1",
    )
    return_n = case["reward"].sum(axis=1)
    rows, advantage_n = algorithms.prepare(settings, algorithms.Step(rows, return_n, case["group"], score, score))
    of_rows = [advantage_n[r.rollout_index] if r.advantage is None else r.advantage for r in rows]
    return np.stack([np.where(row.loss_mask, of_row, 0) for row, of_row in zip(rows, of_rows, strict=True)])


@pytest.mark.parametrize("estimator", [None, "k1", "k2", "k3"])
@pytest.mark.parametrize("name", verl_reference.ADVANTAGES)
def test_advantages_with_and_without_kl_in_the_reward(goldens, case, name, estimator):
    expected = goldens[f"advantage/{name}/{estimator}"]
    np.testing.assert_allclose(prepared(case, name, estimator), expected, **TOLERANCE)


@pytest.mark.parametrize("estimate", [advantages.grpo_advantages, advantages.rloo_advantages])
def test_what_is_not_as_in_verl(estimate):
    """A group of one, and a failed rollout beside two others."""
    return_n = np.array([3.0, 1.0, np.nan, 0.0], np.float32)
    advantage_n = estimate(return_n, np.array([0, 1, 1, 1]))
    assert advantage_n[0] == advantage_n[2] == 0
    np.testing.assert_array_equal(advantage_n[[1, 3]], estimate(np.float32([1, 0]), np.array([1, 1])))
