"""Token-level GAE against the paper's sum, by hand, and against verl's function."""

import numpy as np
import pytest

from lightning_jax.rl import gae


@pytest.fixture
def case():
    """5 rows of 24 places: ragged, with observations between sampled tokens; noise where nothing may be read."""
    rng = np.random.default_rng(0)
    mask_nt = rng.random((5, 24)) < 0.6
    for row, length in enumerate((24, 20, 11, 7, 3)):
        mask_nt[row, length:] = False
    mask_nt[4, 1] = True
    reward_nt = np.where(rng.random((5, 24)) < 0.3, rng.normal(size=(5, 24)), 0).astype(np.float32)
    return reward_nt, rng.normal(size=(5, 24)).astype(np.float32), mask_nt


def test_by_hand():
    """Two sampled tokens, an observation, a third; gamma 0.5, lambda 0.5."""
    reward_nt = np.array([[9.0, 1.0, 0.0, 9.0, 2.0, 9.0]])
    value_nt = np.array([[7.0, 0.5, 1.0, 7.0, 3.0, 7.0]])
    mask_nt = np.array([[False, True, True, False, True, False]])
    advantage_nt, return_nt = gae.token_gae(reward_nt, value_nt, mask_nt, gamma=0.5, gae_lambda=0.5)
    third = 2 - 3
    second = (0 + 0.5 * 3 - 1) + 0.25 * third
    first = (1 + 0.5 * 1 - 0.5) + 0.25 * second
    np.testing.assert_allclose(advantage_nt, [[0, first, second, 0, third, 0]])
    np.testing.assert_allclose(return_nt, [[0, first + 0.5, second + 1, 0, 2, 0]])


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.7), (0.97, 0.0), (0.97, 1.0)])
def test_equals_the_papers_sum(case, gamma, gae_lambda):
    """Eq. 16, the sum of discounted residuals, over each row's sampled tokens alone."""
    reward_nt, value_nt, mask_nt = case
    advantage_nt, return_nt = gae.token_gae(reward_nt, value_nt, mask_nt, gamma=gamma, gae_lambda=gae_lambda)
    for row, mask_t in enumerate(mask_nt):
        reward, value = reward_nt[row, mask_t].astype(float), value_nt[row, mask_t].astype(float)
        delta = reward + gamma * np.append(value[1:], 0) - value
        powers = (gamma * gae_lambda) ** np.arange(len(delta))
        expected = [sum(powers[: len(delta) - t] * delta[t:]) for t in range(len(delta))]
        np.testing.assert_allclose(advantage_nt[row, mask_t], expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(return_nt[row, mask_t], expected + value, rtol=1e-12, atol=1e-12)
    assert not advantage_nt[~mask_nt].any() and not return_nt[~mask_nt].any()


def test_with_lambda_one_the_values_cancel_out_of_the_returns(case):
    reward_nt, value_nt, mask_nt = case
    _, return_nt = gae.token_gae(reward_nt, value_nt, mask_nt, gamma=1.0, gae_lambda=1.0)
    expected_nt = np.cumsum(np.where(mask_nt, reward_nt, 0)[:, ::-1].astype(float), axis=1)[:, ::-1]
    np.testing.assert_allclose(return_nt[mask_nt], expected_nt[mask_nt], atol=1e-12)


def test_whitening(case):
    advantage_nt, _, mask_nt = case
    white_nt = gae.whiten(advantage_nt, mask_nt)
    assert white_nt[mask_nt].mean() == pytest.approx(0, abs=1e-12)
    assert white_nt[mask_nt].std(ddof=1) == pytest.approx(1, rel=1e-6)
    assert not white_nt[~mask_nt].any()
    one_nt = np.zeros_like(mask_nt)
    one_nt[2, 3] = True
    assert not gae.whiten(advantage_nt, one_nt).any()


def test_explained_variance_by_hand():
    returns = np.array([1.0, 2.0, 3.0, 4.0])
    assert gae.explained_variance(returns, returns) == 1
    assert gae.explained_variance(np.full(4, 7.0), returns) == 0
    assert gae.explained_variance(returns[::-1], returns) == pytest.approx(1 - 4)
    assert np.isnan(gae.explained_variance(returns, np.ones(4)))
