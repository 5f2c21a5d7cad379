"""Adapters and frozen parts: what learns, with which gradient, and what it becomes in the sampler."""

import dataclasses
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import config_rules
from lightning_jax.model import llama, lora
from lightning_jax.rl import checkpoint, packing, update
from lightning_jax.rl.learner import Learner, LearnerSettings
from lightning_jax.sampler import programs

LORA = lora.Trainable(lora_rank=3, lora_alpha=6.0)
SETTINGS = LearnerSettings(
    learning_rate=1e-2, kl_coef=0.1, entropy_coef=0.02, batch_size=12, max_seq_len=32, min_block_length=32
)
WITH_LORA = dataclasses.replace(SETTINGS, trainable=LORA)


@pytest.fixture(scope="module")
def adapters(config):
    """Adapters of which neither factor is 0."""
    rng = np.random.default_rng(5)
    specs = lora.trained_specs(config, LORA)
    return jax.tree.map(lambda spec: rng.normal(0, 0.05, spec.shape).astype(np.float32), specs)


def by_hand(params, adapters):
    """W + 2 A B of every projection, in float64 and by the paper's letters alone."""
    layers = dict(params["layers"])
    for stem in ("q", "k", "v", "o", "gate", "up", "down"):
        (name,) = [n for n in layers if n.startswith(f"{stem}_") and "bias" not in n and "norm" not in n]
        (a,) = [leaf for n, leaf in adapters["layers"].items() if n.startswith(f"{stem}_a_")]
        (b,) = [leaf for n, leaf in adapters["layers"].items() if n.startswith(f"{stem}_b_")]
        delta = [
            2.0 * a_l.reshape(-1, 3).astype(np.float64) @ b_l.reshape(3, -1) for a_l, b_l in zip(a, b, strict=True)
        ]
        layers[name] = (layers[name] + np.stack(delta).reshape(layers[name].shape)).astype(np.float32)
    return params | {"layers": layers}


def totals_of(config, settings, params, blocks, frozen=None):
    totals = update.zero_totals(params)
    num_tokens = np.float32(blocks.loss_mask_bt.sum())
    return update.accumulate(totals, params, None, blocks, num_tokens, frozen, config=config, settings=settings)


def test_the_targets_are_those_that_settings_name():
    assert tuple(lora.TARGETS) == config_rules.LORA_TARGETS


def test_gradients_follow_from_those_of_the_merged_model(config, params, adapters, rows, advantages):
    """By the chain rule: dL/dA = 2 dL/dW B^T and dL/dB = 2 A^T dL/dW."""
    blocks = packing.pack(rows, advantages, 32)
    merged = totals_of(config, SETTINGS, by_hand(params, adapters), blocks)
    totals = totals_of(config, WITH_LORA, adapters, blocks, params)
    np.testing.assert_allclose(totals.sums["loss"], merged.sums["loss"], rtol=1e-5)
    assert totals.grads["layers"].keys() == adapters["layers"].keys() and len(adapters["layers"]) == 14
    for name in lora.TARGETS.values():
        stem = name.split("_")[0]
        (a_name,) = [n for n in adapters["layers"] if n.startswith(f"{stem}_a_")]
        (b_name,) = [n for n in adapters["layers"] if n.startswith(f"{stem}_b_")]
        for layer in range(config.num_layers):
            a, b = adapters["layers"][a_name][layer].reshape(-1, 3), adapters["layers"][b_name][layer].reshape(3, -1)
            w = np.asarray(merged.grads["layers"][name][layer], np.float64).reshape(len(a), -1)
            for actual, expected in ((a_name, 2 * w @ b.T), (b_name, 2 * a.T @ w)):
                found = np.asarray(totals.grads["layers"][actual][layer]).reshape(expected.shape)
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=actual)


def test_the_sampler_gets_the_merged_weights(config, params, adapters):
    whole = lora.whole(adapters, params, LORA)
    expected = by_hand(params, adapters)
    for actual, same in (
        (programs.prepare_params(jax.tree.map(jnp.array, whole), jnp.float32), prepared(expected)),
        (lora.merged_arrays(whole, np.dtype(np.float32)), expected),
    ):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-7), actual, same)
    # To a model in bfloat16 they are added in float32, and the sum is rounded once.
    coarse = jax.tree.map(lambda x: jnp.array(x, jnp.bfloat16), params)
    sums = programs.prepare_params(lora.whole(adapters, coarse, LORA), jnp.bfloat16)
    expected = jax.tree.map(lambda x: jnp.array(x, jnp.bfloat16), by_hand(jax.device_get(coarse), adapters))
    same = jax.tree.leaves(jax.tree.map(lambda x, y: np.mean(x == y), sums, prepared(expected)))
    assert np.min(same) > 0.99


def prepared(params):
    """Parameters without adapters as the sampler stores them on CPU."""
    return llama.turn_matrices(llama.unstack_layers(params))


def logprob_sums(learner, rows):
    blocks = [packing.pack([row], np.zeros(12, np.float32), 32) for row in rows]
    batch = jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)
    statics = {"config": learner.config, "settings": learner.settings}
    logprob_bt, _ = update.policy_logprobs(learner.state.params, batch, learner.frozen, **statics)
    return np.where(batch.loss_mask_bt, logprob_bt, 0).sum(axis=1)


def test_adapters_begin_as_the_model_and_learn_what_was_rewarded(config, params, rows):
    advantage_n = np.array([5, -5] * 6, np.float32)
    learner = Learner(config, params, WITH_LORA, seed=7)
    before = logprob_sums(learner, rows)
    np.testing.assert_array_equal(before, logprob_sums(Learner(config, params, SETTINGS), rows))
    a = np.asarray(learner.state.params["layers"]["gate_a_dr"])
    assert np.std(a) == pytest.approx((3 * config.hidden_size) ** -0.5, rel=0.15)
    assert not np.array_equal(a, Learner(config, params, WITH_LORA, seed=8).state.params["layers"]["gate_a_dr"])

    metrics = [learner.update(rows, advantage_n) for _ in range(5)]
    change = logprob_sums(learner, rows) - before
    assert (change * advantage_n > 0).all(), change
    assert metrics[0]["policy/kl"] == 0 < metrics[-1]["policy/kl"]
    jax.tree.map(np.testing.assert_array_equal, learner.frozen, params)
    # The reference is the model itself, and the optimizer knows of nothing but adapters.
    assert all(
        one is other for one, other in zip(*map(jax.tree.leaves, (learner._reference, learner.frozen)), strict=True)
    )
    num_adapter = sum(leaf.size for leaf in jax.tree.leaves(learner.state.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(learner.state.opt_state)) <= 2 * num_adapter + 4


def test_some_targets_only(config):
    names = lora.trained_specs(config, lora.Trainable(2, 4.0, ("q_proj", "down_proj")))["layers"].keys()
    assert names == {"q_a_dr", "q_b_rkgh", "down_a_fr", "down_b_rd"}


def test_frozen_parts_stay_and_have_no_optimizer_state(config, params, rows, advantages):
    pattern = "embed_tokens|lm_head|norm|k_proj"
    frozen = dataclasses.replace(SETTINGS, trainable=lora.Trainable(frozen=pattern))
    learner = Learner(config, params, frozen)
    assert set(learner.state.params) == {"layers"}
    assert {name.split("_")[0] for name in learner.state.params["layers"]} == {"q", "v", "o", "gate", "up", "down"}
    trained = sum(leaf.size for leaf in jax.tree.leaves(learner.state.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(learner.state.opt_state)) <= 2 * trained + 4

    blocks = packing.pack(rows, advantages, 32)
    actual = totals_of(config, frozen, learner.state.params, blocks, learner.frozen).grads["layers"]
    expected = totals_of(config, SETTINGS, params, blocks).grads["layers"]
    for name, grad in actual.items():
        np.testing.assert_allclose(grad, expected[name], rtol=0, atol=1e-5 * np.abs(expected[name]).max())

    metrics = [learner.update(rows, advantages) for _ in range(2)]
    assert metrics[0]["policy/kl"] == 0 < metrics[1]["policy/kl"]
    after = learner.params
    for name in ("embed_vd", "final_norm_d"):
        np.testing.assert_array_equal(after[name], params[name])
    np.testing.assert_array_equal(after["layers"]["k_dkh"], params["layers"]["k_dkh"])
    assert not np.array_equal(after["layers"]["q_dkgh"], params["layers"]["q_dkgh"])


@pytest.mark.parametrize("pattern, words", [("wte", "finds none"), ("", None), (".", "finds all"), ("norm", None)])
def test_a_pattern_must_leave_something_and_find_something(config, pattern, words):
    trainable = lora.Trainable(frozen=pattern)
    if words is None:
        trainable.check(config)
    else:
        with pytest.raises(InvalidConfigError, match=f"{words}.*\n.*model.layers.self_attn.q_proj"):
            trainable.check(config)


ON_EIGHT = """
import sys, pickle, jax, numpy as np
from pathlib import Path
from lightning_jax import mesh
from lightning_jax.rl import checkpoint
from lightning_jax.rl.learner import Learner
from lightning_jax.sampler import programs
folder = Path(sys.argv[1])
config, params, settings, rows, advantages = pickle.loads((folder / "case.pickle").read_bytes())
devices = mesh.make_mesh(data=2, fsdp=2, tensor=2)
learner = Learner(config, params, settings, mesh=devices, seed=7)
parts = learner.state.params["layers"]
assert parts["gate_b_rf"].addressable_shards[0].data.shape[-1] * 2 == parts["gate_b_rf"].shape[-1]
assert parts["gate_a_dr"].addressable_shards[0].data.shape[1] * 2 == parts["gate_a_dr"].shape[1]
for _ in range(2):
    learner.update(rows, advantages)
checkpoint.save(folder, 2, learner.state, {})
with jax.set_mesh(devices):
    merged = jax.jit(programs.prepare_params, static_argnames="dtype")(learner.params, dtype="float32")
(folder / "merged.pickle").write_bytes(pickle.dumps(jax.device_get(merged)))
"""


def test_eight_devices_learn_what_one_does(config, params, rows, advantages, tmp_path):
    (tmp_path / "case.pickle").write_bytes(pickle.dumps((config, params, WITH_LORA, rows, advantages)))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT, tmp_path], capture_output=True, text=True, env=os.environ | flags
    )
    assert done.returncode == 0, done.stderr

    learner = Learner(config, params, WITH_LORA, seed=7)
    for _ in range(2):
        learner.update(rows, advantages)
    restored, _ = checkpoint.restore(tmp_path / "step-2", learner.abstract_state())
    for actual, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(learner.state), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)
    merged = pickle.loads((tmp_path / "merged.pickle").read_bytes())
    expected = programs.prepare_params(learner.params, jnp.float32)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5), merged, expected)
