"""Token-level GAE against the paper's sum, by hand, and against verl's function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.rl import critic, gae
from tests.rl import verl_ppo


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


# verl -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["golden", "live"])
def verl(request):
    """What verl's functions give for `verl_ppo.inputs()`: as recorded, and as installed."""
    if request.param == "golden":
        return np.load(verl_ppo.GOLDENS)
    if verl_ppo.installed() is None:
        pytest.skip("verl is not installed")
    pytest.importorskip("torch")
    return verl_ppo.outputs(verl_ppo.installed())


def test_advantages_and_returns_equal_verl(verl):
    """Whitened, at the sampled tokens; verl's are in float32, and at other places carried along."""
    given = verl_ppo.inputs()
    mask_nt = given["mask_nt"]
    for i, (gamma, gae_lambda) in enumerate(verl_ppo.SETTINGS):
        advantage_nt, return_nt = gae.token_gae(
            given["reward_nt"], given["value_nt"], mask_nt, gamma=gamma, gae_lambda=gae_lambda
        )
        white_nt = gae.whiten(advantage_nt, mask_nt)
        np.testing.assert_allclose(white_nt[mask_nt], verl[f"advantage_{i}"][mask_nt], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(return_nt[mask_nt], verl[f"return_{i}"][mask_nt], rtol=1e-6, atol=1e-6)


def test_value_loss_and_its_gradient_equal_verl(verl):
    given = {name: jnp.array(x) for name, x in verl_ppo.inputs().items()}
    count = jnp.sum(given["mask_nt"], dtype=jnp.float32)

    def loss(new_value_nt):
        return critic.value_loss(
            new_value_nt,
            given["value_nt"],
            given["target_nt"],
            given["mask_nt"],
            count,
            value_clip=verl_ppo.VALUE_CLIP,
        )

    (value, clipped), gradient_nt = jax.value_and_grad(loss, has_aux=True)(given["new_value_nt"])
    np.testing.assert_allclose(value, verl["value_loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient_nt, verl["value_gradient"], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(clipped / count, verl["clip_fraction"], rtol=1e-6)
    assert 0.1 < verl["clip_fraction"] < 0.9
