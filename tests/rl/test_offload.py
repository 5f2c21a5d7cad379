"""What waits in the host's memory: where it is, and that nothing of the numbers depends on it."""

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import mesh as mesh_lib
from lightning_jax.rl import checkpoint, offload
from lightning_jax.rl.learner import Learner
from lightning_jax.rl.update import LearnerSettings

SETTINGS = LearnerSettings(learning_rate=1e-3, kl_coef=0.5, min_block_length=32, optimizer_steps=2)


def kinds(tree) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def trained(config, params, rows, advantages, settings, mesh=None):
    """A learner after two updates, and their metrics."""
    learner = Learner(config, params, settings, mesh=mesh)
    return learner, [learner.update(rows, advantages) for _ in range(2)]


@pytest.fixture
def plain(config, params, rows, advantages):
    return trained(config, params, rows, advantages, SETTINGS)


@pytest.mark.parametrize("choice", offload.CHOICES[1:])
def test_the_same_numbers_as_without(config, params, rows, advantages, plain, choice):
    settings = dataclasses.replace(SETTINGS, offload=choice)
    learner, metrics = trained(config, params, rows, advantages, settings)
    hosted, device = {"pinned_host"}, kinds(learner.state.params)
    assert hosted != device
    assert kinds(learner._reference) == (hosted if choice != "optimizer" else device)
    assert kinds(learner.state.opt_state) == (hosted if choice != "reference" else device)
    expected, expected_metrics = plain
    for name in expected_metrics[1]:
        np.testing.assert_allclose(metrics[1][name], expected_metrics[1][name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert metrics[1]["policy/kl"] > 0
    for a, b in zip(jax.tree.leaves(learner.state.params), jax.tree.leaves(expected.state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    scores, expected_scores = learner.score(rows[:1])[0], expected.score(rows[:1])[0]
    np.testing.assert_allclose(scores.reference_logprob, expected_scores.reference_logprob, atol=1e-6)


@pytest.mark.skipif(jax.device_count() < 2, reason="run by the test below")
def test_on_a_mesh(config, params, rows, advantages, plain):
    settings = dataclasses.replace(SETTINGS, offload="both")
    learner, metrics = trained(config, params, rows, advantages, settings, mesh_lib.make_mesh(fsdp=2))
    assert kinds(learner.state.opt_state) == kinds(learner._reference) == {"pinned_host"}
    np.testing.assert_allclose(metrics[1]["policy/kl"], plain[1][1]["policy/kl"], rtol=1e-4)


def test_on_two_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "pytest", "-n0", "-q", f"{__file__}::test_on_a_mesh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_a_checkpoint_goes_on_where_it_was(config, params, rows, advantages, tmp_path):
    settings = dataclasses.replace(SETTINGS, offload="both")
    learner = Learner(config, params, settings)
    learner.update(rows, advantages)
    path = checkpoint.save(tmp_path, 1, learner.state, {})
    other = Learner(config, params, settings)
    other.restore(checkpoint.restore(path, other.abstract_state())[0])
    assert kinds(other.state.opt_state) == {"pinned_host"}
    for each in (learner, other):
        each.update(rows, advantages)
    for a, b in zip(jax.tree.leaves(learner.state), jax.tree.leaves(other.state), strict=True):
        assert np.array_equal(a, b)


def test_devices_without_such_memory_are_told_of(monkeypatch):
    class Device:
        device_kind = "abacus"

        def addressable_memories(self):
            return []

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(InvalidConfigError, match=r"runtime.offload .* abacus"):
        offload.to_host({})
