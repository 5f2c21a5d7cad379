"""Return-to-go and its advantages: the reference's example, the equation written out, and what it becomes alone."""

import numpy as np
import pytest

from lightning_jax.rl import advantages, credit, packing, trajectory


def test_the_agents_return_is_the_last_transitions():
    np.testing.assert_array_equal(credit.transition_rewards([0.5, 0.0, -0.25], 1.0), [0.5, 0.0, 0.75])
    assert credit.transition_rewards([], 1.0).shape == (0,)


def test_the_references_two_step_trajectory_has_its_total():
    """total_reward 1.5 = 0.5 for the query + 1.0 for the answer; a total of it is the first transition's return."""
    reward_j = credit.transition_rewards([0.5, 0.0], 1.0)
    assert reward_j.tolist() == [0.5, 1.0] and reward_j.sum() == 1.5


def test_advantages_are_the_equation():
    rewards = [np.array([0.5, 1.0]), np.array([0.0, -0.2, 0.0]), np.array([2.0, 1.0])]
    group_n, trained_n = np.array([4, 4, 7]), np.array([True, True, True])
    returns = [1.5, 1.0, -0.2, -0.2, 0.0]  # of the first group, by hand
    mean = sum(returns) / 5
    std = (sum((g - mean) ** 2 for g in returns) / 4) ** 0.5
    expected = [(g - mean) / (std + 1e-6) for g in returns]
    first, second, other = credit.step_advantages(rewards, group_n, trained_n)
    np.testing.assert_allclose([*first, *second], expected, rtol=1e-6)
    np.testing.assert_allclose(other, [0.5**0.5, -(0.5**0.5)], rtol=1e-5)  # 3 and 1: a group of its own
    assert first.dtype == np.float32


def test_one_transition_each_is_what_trajectories_have():
    return_n = np.array([1.0, 0.0, np.nan, 0.25, 3.0, 3.0], np.float32)
    group_n = np.array([0, 0, 0, 0, 1, 1])
    trained_n = advantages.trained_rollouts(return_n, group_n)
    by_step = credit.step_advantages([np.array([r]) for r in return_n], group_n, trained_n)
    np.testing.assert_array_equal(np.concatenate(by_step), advantages.grpo_advantages(return_n, group_n))


@pytest.mark.parametrize("rewards", [[[], []], [[1.0], []], [[1.0, 2.0], [np.nan]]])
def test_trajectories_without_part_have_no_advantage(rewards):
    """No call was made, or the rollout failed."""
    trained_n = np.array([np.isfinite(sum(r)) for r in rewards])
    result = credit.step_advantages([np.array(r) for r in rewards], np.zeros(2, int), trained_n)
    assert [len(a) for a in result] == [len(r) for r in rewards]
    assert all(np.isfinite(a).all() for a in result) and not result[1].any()


def test_each_calls_tokens_carry_its_advantage():
    """Through rows and packing: a conversation of two calls, and a call apart; nothing but sampled tokens has any."""
    calls = [
        trajectory.TokenCall(0, None, [1, 2], [3, 4], [-1.0, -1.0], advantage=0.5),
        trajectory.TokenCall(1, 0, [1, 2, 3, 4, 5], [6], [-1.0], advantage=-2.0),
        trajectory.TokenCall(2, None, [9], [8, 7], [-1.0, -1.0], advantage=3.0),
    ]
    rows = trajectory.build_rows(calls, 0)
    batch = packing.pack(rows, np.array([99.0], np.float32), 16)
    used = batch.segment_bt[0] > 0
    of_token = dict(zip(batch.token_bt[0][used].tolist(), batch.advantage_bt[0][used].tolist(), strict=True))
    assert of_token == {1: 0, 2: 0, 3: 0.5, 4: 0.5, 5: 0, 6: -2.0, 9: 0, 8: 3.0, 7: 3.0}
    assert batch.advantage_bt.dtype == np.float32
