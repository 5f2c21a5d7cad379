"""The critic against torch and transformers, against itself cut into other pieces, and in the learner."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import mesh as mesh_lib
from lightning_jax.model import export, lora
from lightning_jax.rl import algorithms, checkpoint, credit, critic, packing, trajectory
from lightning_jax.rl.learner import Learner, LearnerSettings

SETTINGS = LearnerSettings(
    learning_rate=1e-3,
    kl_coef=0.0,
    batch_size=12,
    max_seq_len=32,
    min_block_length=32,
    epochs=2,
    optimizer_steps=2,
    critic="copy",
    critic_lr=3e-3,
    critic_warmup=2,
    value_clip=0.2,
)
PPO = algorithms.AlgorithmSettings("ppo")


def with_reward(rows, reward_n):
    """The rows with each rollout's reward at its last sampled token."""
    rewarded = []
    for row in rows:
        reward = np.zeros(len(row), np.float32)
        reward[np.flatnonzero(row.loss_mask)[-1]] = reward_n[row.rollout_index]
        rewarded.append(dataclasses.replace(row, reward=reward))
    return rewarded


@pytest.fixture
def rewarded(rows):
    return with_reward(rows, np.array([1, 0] * 6, np.float32))


def prepared(learner, rows):
    groups = np.repeat(np.arange(3), 4)
    return algorithms.prepare(PPO, algorithms.Step(rows, np.zeros(12), groups, learner.score, learner.values))


def random_head(learner):
    """Gives the critic a head that is not 0."""
    state = learner.state.critic
    head_d = jax.device_put(
        np.random.default_rng(5).normal(size=state.params["head_d"].shape).astype(np.float32),
        state.params["head_d"].sharding,
    )
    learner.state = learner.state.replace(critic=state.replace(params=state.params | {"head_d": head_d}))
    return np.asarray(head_d)


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "loss", "gradient", "clipped"),
    [
        (0.1, 0.5 * 0.9**2, -0.9, 0),  # near the old value, 0: the plain error
        (0.5, 0.5 * 0.8**2, 0.0, 1),  # beyond 0.2 and nearer to the return, 1: it does not pay
        (-0.5, 0.5 * 1.5**2, -1.5, 0),  # beyond, but the wrong way: it pays
    ],
)
def test_value_loss_by_hand(value, loss, gradient, clipped):
    def of(value_bt, clip=0.2):
        one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
        return critic.value_loss(value_bt, zero, one, one > 0, jnp.float32(1), value_clip=clip)

    value_bt = jnp.full((1, 1), value)
    (actual, count), actual_gradient = jax.value_and_grad(of, has_aux=True)(value_bt)
    np.testing.assert_allclose((actual, actual_gradient[0, 0], count), (loss, gradient, clipped), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(of(value_bt, None), (0.5 * (value - 1) ** 2, 0), rtol=1e-6)


def test_what_is_masked_cannot_spoil_the_gradient():
    def loss(value_bt):
        target_bt = jnp.array([[jnp.inf, 1.0]])
        mask_bt = jnp.array([[False, True]])
        return critic.value_loss(value_bt, value_bt * 0, target_bt, mask_bt, jnp.float32(1), value_clip=0.2)[0]

    np.testing.assert_allclose(jax.grad(loss)(jnp.array([[1e30, 0.1]])), [[0.0, -0.9]], rtol=1e-6)


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", critic.KINDS)
def test_values_equal_transformers(config, params, rows, tmp_path, kind):
    """The head's product with the hidden state before each token, of transformers' Llama, row by row."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    export.save_hf(tmp_path, config, params)
    model = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    learner = Learner(config, params, dataclasses.replace(SETTINGS, critic=kind))
    assert not any(value.any() for value in learner.values(rows))
    head_d = random_head(learner)
    assert learner.values([]) == []
    for row, value in zip(rows, learner.values(rows), strict=True):
        with torch.no_grad():
            x_td = model(torch.tensor(row.token_ids[None], dtype=torch.long)).last_hidden_state[0].numpy()
        np.testing.assert_allclose(value[1:], (x_td @ head_d)[:-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_give_the_gradient_of_the_whole(config, params, rewarded, size):
    learner = Learner(config, params, SETTINGS)
    random_head(learner)
    rows, advantage_n = prepared(learner, rewarded)
    blocks = packing.pack(rows, advantage_n, 32)
    own = learner.state.critic.params

    def totals(size):
        total = critic.zero_totals(own)
        num_tokens = np.float32(blocks.loss_mask_bt.sum())
        for batch in packing.micro_batches(blocks, size):
            total = critic.accumulate(total, own, params, batch, num_tokens, config=config, settings=SETTINGS)
        return total

    whole, parts = totals(blocks.token_bt.shape[0]), totals(size)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    assert np.abs(whole.grads["head_d"]).max() > 0 and np.abs(whole.grads["trunk"]["embed_vd"]).max() > 0


# In the learner -------------------------------------------------------------------------------------------------------


def test_the_critic_learns_what_was_paid(config, params, rewarded):
    learner = Learner(config, params, SETTINGS)
    metrics = [learner.update(*prepared(learner, rewarded)) for _ in range(12)]
    assert metrics[0]["critic/explained_variance"] == 0 < 0.8 < metrics[-1]["critic/explained_variance"]
    assert metrics[-1]["critic/value_loss"] < 0.2 * metrics[0]["critic/value_loss"]
    assert metrics[0]["critic/learning_rate"] == pytest.approx(3e-3)


def test_in_the_warmup_the_policy_stays_as_it_is(config, params, rewarded):
    learner = Learner(config, params, SETTINGS)
    for _ in range(2):
        metrics = learner.update(*prepared(learner, rewarded))
        assert not [name for name in metrics if name.startswith("policy/")]
    jax.tree.map(np.testing.assert_array_equal, learner.state.params, params)
    assert learner.state.step == 0 and learner.state.critic.step == 8
    metrics = learner.update(*prepared(learner, rewarded))
    assert metrics["policy/grad_norm"] > 0 and learner.state.step == 4  # 2 passes in 2 parts
    assert learner.state.critic.updates == 3


def test_a_shared_trunk_is_not_moved_by_the_value_loss(config, params, rewarded):
    settings = dataclasses.replace(SETTINGS, critic="shared")  # the policy does not learn in the first two updates
    learner = Learner(config, params, settings)
    for _ in range(2):
        metrics = learner.update(*prepared(learner, rewarded))
    assert set(learner.state.critic.params) == {"head_d"} and learner.state.critic.params["head_d"].any()
    assert metrics["critic/grad_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, learner.state.params, params)


def test_beside_adapters_the_critic_has_adapters_of_its_own(config, params, rewarded):
    trainable = lora.Trainable(lora_rank=2)
    learner = Learner(config, params, dataclasses.replace(SETTINGS, trainable=trainable))
    learner.update(*prepared(learner, rewarded))
    own = learner.state.critic.params["trunk"]
    assert jax.tree.structure(own) == jax.tree.structure(learner.state.params)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (own, learner.state.params)), strict=True))


def test_a_restored_critic_goes_on_to_the_same_bits(config, params, rewarded, tmp_path):
    straight = Learner(config, params, SETTINGS)
    straight.update(*prepared(straight, rewarded))
    checkpoint.save(tmp_path, 1, straight.state, {})
    expected = [straight.update(*prepared(straight, rewarded)) for _ in range(2)]
    resumed = Learner(config, params, SETTINGS)
    resumed.state, _ = checkpoint.restore(tmp_path, resumed.abstract_state())
    assert [resumed.update(*prepared(resumed, rewarded)) for _ in range(2)] == expected
    jax.tree.map(np.testing.assert_array_equal, resumed.state, straight.state)


def test_checkpoints_with_and_without_a_critic(config, params, tmp_path):
    def learner(**changes):
        return Learner(config, params, dataclasses.replace(SETTINGS, **changes))

    checkpoint.save(tmp_path / "with", 1, learner().state, {})
    checkpoint.save(tmp_path / "without", 1, learner(critic=None).state, {})
    state, _ = checkpoint.restore(tmp_path / "with", learner(critic=None).abstract_state())
    assert state.critic is None
    with pytest.raises(InvalidConfigError, match="holds no critic"):
        checkpoint.restore(tmp_path / "without", learner().abstract_state())
    with pytest.raises(InvalidConfigError, match="another model's"):
        checkpoint.restore(tmp_path / "with", learner(critic="shared").abstract_state())


# Rewards of several rows ----------------------------------------------------------------------------------------------


def test_a_row_sees_what_its_rollout_earned_after_it(rows):
    """Calls 0 and 3 in one row, 1 and 2 in rows of their own; they earn 1, 10, 100 and 1000."""

    def call(number, parent, prompt, sampled, reward):
        return trajectory.TokenCall(number, parent, prompt, sampled, np.zeros(len(sampled)), reward=reward)

    calls = [
        call(0, None, [1], [2, 3], 1.0),
        call(1, None, [5], [6], 10.0),
        call(2, None, [7], [8, 9], 100.0),
        call(3, 0, [1, 2, 3, 4], [5], 1000.0),
    ]
    built = trajectory.build_rows(calls, 0)
    seen = {
        tuple(row.token_ids): reward.tolist() for row, reward in zip(built, credit.seen_rewards(built), strict=True)
    }
    assert seen == {
        (1, 2, 3, 4, 5): [0, 0, 1 + 10 + 100, 0, 1000],
        (5, 6): [0, 10 + 100 + 1000],
        (7, 8, 9): [0, 0, 100 + 1000],
    }


def test_what_a_call_earned_on_the_way_reaches_the_tokens_before_it():
    """A reply that earned 0.25 of AIR, an observation, a reply after which the agent returned 1; all values are 0.5."""
    calls = [
        trajectory.TokenCall(0, None, [1], [2, 3], np.zeros(2), reward=0.25),
        trajectory.TokenCall(1, 0, [1, 2, 3, 4], [5], np.zeros(1), reward=1.0),
    ]
    rows = trajectory.build_rows(calls, 0)

    def values(rows):
        return [np.full(len(row), 0.5, np.float32) for row in rows]

    settings = algorithms.AlgorithmSettings("ppo", gamma=1.0, gae_lambda=1.0)
    (row,), _ = algorithms.prepare(settings, algorithms.Step(rows, np.array([1.25]), np.array([0]), None, values))
    np.testing.assert_allclose(row.value_target, [0, 1.25, 1.25, 0, 1])
    np.testing.assert_allclose(row.value[row.loss_mask], 0.5)
    plain = np.array([0.75, 0.75, 0.5])  # whitened over the three tokens
    expected = (plain - plain.mean()) / plain.std(ddof=1)
    np.testing.assert_allclose(row.advantage, [0, *expected[:2], 0, expected[2]], rtol=1e-5)


# Several devices ------------------------------------------------------------------------------------------------------


def test_with_four_devices():
    """The test below, in a process that has them."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", f"{__file__}::test_a_mesh_changes_nothing"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "1 passed" in done.stdout, done.stdout


@pytest.mark.skipif(jax.device_count() < 4, reason="run by the test above")
def test_a_mesh_changes_nothing(config, params, rewarded, tmp_path):
    """The curve is that of one device, and a checkpoint goes from the one to the other."""
    mesh = mesh_lib.make_mesh(fsdp=2, tensor=2)
    one, spread = Learner(config, params, SETTINGS), Learner(config, params, SETTINGS, mesh=mesh)
    for _ in range(2):
        a, b = (learner.update(*prepared(learner, rewarded)) for learner in (one, spread))
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert not spread.state.critic.params["trunk"]["layers"]["up_df"].sharding.is_fully_replicated
    checkpoint.save(tmp_path, 2, spread.state, {})
    restored, _ = checkpoint.restore(tmp_path, one.abstract_state())
    jax.tree.map(np.testing.assert_array_equal, restored.critic, spread.state.critic)
