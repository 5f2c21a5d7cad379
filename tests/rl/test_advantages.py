"""Advantages against the equation: by hand, and with the standard library's statistics."""

import statistics

import numpy as np
import pytest

from lightning_jax.rl.advantages import grpo_advantages, trained_rollouts

NAN = float("nan")


def advantages(returns, groups, **kwargs):
    return grpo_advantages(np.array(returns, np.float32), np.array(groups, np.int32), **kwargs)


def test_by_hand():
    # Mean 0.5; deviations +-0.5; Bessel-corrected std = sqrt(4 * 0.25 / 3) = 0.57735.
    np.testing.assert_allclose(advantages([1, 0, 0, 1], [7] * 4), np.array([1, -1, -1, 1]) * 0.8660254, rtol=3e-6)


def test_each_group_is_standardised_by_itself():
    rng = np.random.default_rng(0)
    return_n, group_n = rng.normal(size=64).astype(np.float32), rng.integers(5, size=64)
    result = grpo_advantages(return_n, group_n)
    for group in range(5):
        members = [float(x) for x in return_n[group_n == group]]
        mean, std = statistics.mean(members), statistics.stdev(members)
        np.testing.assert_allclose(result[group_n == group], [(x - mean) / (std + 1e-6) for x in members], rtol=1e-5)
    assert result.dtype == np.float32


def test_a_failed_rollout_is_not_a_zero_reward():
    with_failure = advantages([1, 0, NAN, 0.5], [0] * 4)
    np.testing.assert_array_equal(with_failure[[0, 1, 3]], advantages([1, 0, 0.5], [0] * 3))
    assert with_failure[2] == 0
    np.testing.assert_array_equal(advantages([1, 0, float("inf"), 0.5], [0] * 4), with_failure)


def test_groups_with_fewer_than_two_survivors_are_dropped():
    returns, groups = [1, NAN, 5, NAN, NAN, 1, 0], [0, 0, 1, 2, 2, 3, 3]
    np.testing.assert_array_equal(advantages(returns, groups)[:5], 0)
    assert trained_rollouts(np.array(returns), np.array(groups)).tolist() == [False] * 5 + [True] * 2


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7, 1e6])
def test_equal_rewards_have_exactly_no_advantage(value):
    np.testing.assert_array_equal(advantages([value] * 7, [0] * 7), 0)


def test_a_large_common_offset_changes_nothing():
    rewards = np.array([0, 1, 2, 4], np.float32)
    np.testing.assert_allclose(advantages(rewards + 4096, [0] * 4), advantages(rewards, [0] * 4), rtol=1e-6)


def test_std_eps_is_added_to_the_deviation():
    np.testing.assert_allclose(advantages([0, 2], [0, 0], std_eps=1.0), np.array([-1, 1]) / (2**0.5 + 1), rtol=1e-6)
