"""Learning rates over a run: optax's own, from the first optimizer step to the last, and through a checkpoint."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.config import merge
from lightning_jax.rl import algorithms, checkpoint, critic, update
from lightning_jax.rl.learner import Learner
from lightning_jax.rl.settings import learner_settings
from lightning_jax.rl.update import LearnerSettings


def test_cosine_is_optax_warmup_cosine_decay():
    settings = LearnerSettings(
        learning_rate=2e-4, lr_schedule="cosine", lr_min_ratio=0.1, warmup_steps=5, decay_steps=40
    )
    expected = optax.warmup_cosine_decay_schedule(4e-5, 2e-4, 4, 40, end_value=2e-5)
    step = np.arange(60)
    np.testing.assert_allclose(update.learning_rate(settings)(step), expected(step), rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_each_schedule_is_its_formula(schedule, warmup):
    settings = LearnerSettings(
        learning_rate=1e-3, lr_schedule=schedule, lr_min_ratio=0.25, warmup_steps=warmup, decay_steps=20
    )
    first = max(0, warmup - 1)  # the step that is at the peak
    for step in range(25):
        part = min(1.0, max(0, step - first) / (20 - first))
        fallen = {"constant": 1.0, "linear": 1 - part, "cosine": 0.5 * (1 + np.cos(np.pi * part))}[schedule]
        expected = 1e-3 * (0.25 + 0.75 * fallen) if step >= first else 1e-3 * (step + 1) / warmup
        assert update.learning_rate(settings)(np.int32(step)) == pytest.approx(expected, rel=1e-5), step


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("peak", [5e-7, 1e-4, 7e-3])
def test_a_rate_that_comes_down_to_nothing_is_never_negative(schedule, peak):
    """As it is compiled, in float32, where the peak less all of it is not quite 0."""
    settings = LearnerSettings(learning_rate=peak, lr_schedule=schedule, warmup_steps=2, decay_steps=13)
    rates = jax.jit(update.learning_rate(settings))(np.arange(20))
    assert np.all(rates >= 0) and rates[-1] == 0


def test_updates_of_the_configuration_are_optimizer_steps_of_actor_and_critic():
    """Two passes in three parts are six optimizer steps; the actor has two updates fewer than its critic."""
    values = {"name": "ppo", "ppo_epochs": 2, "mini_batches": 3, "critic_warmup": 2, "critic_lr": 1e-2}
    values |= {"learning_rate": 1e-3, "lr_schedule": "linear", "warmup_steps": 1}
    flags = {f"algorithm.{name}": value for name, value in values.items()} | {"runtime.total_steps": 10}
    settings = learner_settings(merge(environ={}, flag_overrides=flags), np.dtype("float32"))
    actor, own = update.learning_rate(settings), update.learning_rate(critic.with_own_rate(settings))
    assert actor(0) == pytest.approx(1e-3 / 6) and actor(5) == pytest.approx(1e-3)
    assert actor(6 * 8 - 1) > 0 == actor(6 * 8)
    assert own(5) == pytest.approx(1e-2) and own(6 * 10 - 1) > 0 == own(6 * 10)


@pytest.mark.parametrize(
    "values, says",
    [
        ({"lr_schedule": "cosin"}, r"'cosin' \(flag.*did you mean 'cosine'"),
        ({"lr_schedule": "cosine"}, "'cosine' needs to know at which update it ends.*runtime.total_steps"),
        (
            {"lr_schedule": "linear", "lr_decay_steps": 5, "warmup_steps": 5},
            "ends at update 5, and the warm-up takes 5",
        ),
        ({"lr_min_ratio": 0.1}, "is without effect where algorithm.lr_schedule is 'constant'"),
        ({"lr_decay_steps": 9}, "is without effect where algorithm.lr_schedule is 'constant'"),
        ({"lr_schedule": "linear", "lr_decay_steps": 5, "lr_min_ratio": 1.5}, "lr_min_ratio must be between 0 and 1"),
    ],
)
def test_schedules_that_cannot_be(values, says):
    with pytest.raises(InvalidConfigError, match=f"(?s){says}"):
        merge(environ={}, flag_overrides={f"algorithm.{name}": value for name, value in values.items()})


def test_a_restored_run_goes_on_with_the_same_rates_to_the_last_bit(config, params, rows, tmp_path):
    """Actor and critic on a cosine with warm-up: five updates, and two with three more from the checkpoint."""
    settings = LearnerSettings(
        learning_rate=1e-2,
        kl_coef=0,
        critic="copy",
        critic_lr=2e-2,
        critic_warmup=1,
        batch_size=12,
        max_seq_len=32,
        min_block_length=32,
        weight_decay=0.1,
        lr_schedule="cosine",
        lr_min_ratio=0.1,
        warmup_steps=2,
        decay_steps=4,
    )
    paid = [dataclasses.replace(row, reward=row.loss_mask.astype(np.float32)) for row in rows]

    def updated(learner):
        step = algorithms.Step(paid, np.ones(12), np.arange(12) // 4, learner.score, learner.values)
        return learner.update(*algorithms.prepare(algorithms.AlgorithmSettings(name="ppo"), step))

    whole, first, second = (Learner(config, params, settings) for _ in range(3))
    expected = [updated(whole) for _ in range(5)]
    metrics = [updated(first) for _ in range(2)]
    path = checkpoint.save(tmp_path, 2, first.state, {})
    second.restore(checkpoint.restore(path, second.abstract_state())[0])
    metrics += [updated(second) for _ in range(3)]
    assert metrics == expected
    jax.tree.map(np.testing.assert_array_equal, second.state, whole.state)
    actor, own = update.learning_rate(settings), update.learning_rate(critic.with_own_rate(settings))
    assert [m.get("policy/learning_rate") for m in metrics] == [None, *(pytest.approx(actor(i)) for i in range(4))]
    assert [m["critic/learning_rate"] for m in metrics] == [pytest.approx(own(i)) for i in range(5)]
