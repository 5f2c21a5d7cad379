"""Log-probs and losses against torch's autograd on the papers' equations, and against values worked out by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax import mesh
from lightning_jax.model import llama
from lightning_jax.rl import losses

B, T, D, V = 3, 16, 8, 41
COEFFICIENTS = {"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.05, "entropy_coef": 0.01}


@pytest.fixture(scope="module")
def case():
    """Hidden states, an unembedding, and a ragged mask with temperatures; ratios that either bound clips."""
    rng = np.random.default_rng(1)
    mask_bt = rng.random((B, T)) < 0.6
    mask_bt[:, 0] = False
    return {
        "x_btd": rng.normal(size=(B, T, D)).astype(np.float32),
        "unembed_dv": rng.normal(0, 0.7, size=(D, V)).astype(np.float32),
        "token_bt": rng.integers(V, size=(B, T)).astype(np.int32),
        "temperature_bt": rng.choice(np.array([0, 0.5, 1, 1.3], np.float32), size=(B, T)),
        "mask_bt": mask_bt,
        "advantage_bt": rng.normal(size=(B, T)).astype(np.float32),
        "old_shift_bt": rng.normal(0, 0.4, size=(B, T)).astype(np.float32),
        "reference_shift_bt": rng.normal(0, 0.4, size=(B, T)).astype(np.float32),
    }


def jax_loss(weights, case, chunk, num_tokens):
    config = llama.LlamaConfig(V, D, 1, 1, 1, 1, D)
    logprob_bt, entropy_bt = losses.token_logprobs(
        {"unembed_dv": weights["unembed_dv"]},
        config,
        weights["x_btd"],
        case["token_bt"],
        case["temperature_bt"],
        case["mask_bt"],
        chunk=chunk,
    )
    loss, sums = losses.grpo_loss(
        logprob_bt,
        jax.lax.stop_gradient(logprob_bt) + case["old_shift_bt"],
        jax.lax.stop_gradient(logprob_bt) + case["reference_shift_bt"],
        entropy_bt,
        case["advantage_bt"],
        case["mask_bt"],
        num_tokens,
        **COEFFICIENTS,
    )
    return loss, (sums, logprob_bt, entropy_bt)


def torch_loss(case):
    """PPO eq. 7, DeepSeekMath eq. 3 and 4 and the mean over tokens, written out in float64 with torch."""
    torch = pytest.importorskip("torch")
    weights = {
        name: torch.tensor(case[name], dtype=torch.float64, requires_grad=True) for name in ("x_btd", "unembed_dv")
    }
    temperature_bt = torch.tensor(np.where(case["temperature_bt"] == 0, 1, case["temperature_bt"]), dtype=torch.float64)
    total, count, sums = 0.0, 0, dict.fromkeys(("kl", "entropy", "clipped_low", "clipped_high", "ratio"), 0.0)
    for b in range(B):
        for t in np.flatnonzero(case["mask_bt"][b]):
            # The token at t is predicted from the hidden state at t - 1, at its own temperature.
            logits_v = weights["x_btd"][b, t - 1] @ weights["unembed_dv"] / temperature_bt[b, t]
            distribution = torch.distributions.Categorical(logits=logits_v)
            logprob = distribution.log_prob(torch.tensor(int(case["token_bt"][b, t])))
            entropy = distribution.entropy()
            ratio = torch.exp(logprob - (logprob.detach() + float(case["old_shift_bt"][b, t])))
            advantage = float(case["advantage_bt"][b, t])
            clipped = torch.clamp(ratio, 1 - COEFFICIENTS["clip_low"], 1 + COEFFICIENTS["clip_high"])
            surrogate = torch.min(ratio * advantage, clipped * advantage)
            reference = logprob.detach() + float(case["reference_shift_bt"][b, t])
            kl = torch.exp(reference - logprob) - (reference - logprob) - 1
            total = total - surrogate + COEFFICIENTS["kl_coef"] * kl - COEFFICIENTS["entropy_coef"] * entropy
            count += 1
            low = advantage < 0 and ratio.item() < 1 - COEFFICIENTS["clip_low"]
            high = advantage > 0 and ratio.item() > 1 + COEFFICIENTS["clip_high"]
            values = {"kl": kl, "entropy": entropy, "clipped_low": low, "clipped_high": high, "ratio": ratio}
            for name, value in values.items():
                sums[name] += value.item() if hasattr(value, "item") else value
    loss = total / count
    loss.backward()
    return loss.item(), {name: weight.grad.numpy() for name, weight in weights.items()}, sums, count


@pytest.mark.parametrize(("chunk", "platform"), [(None, "cpu"), (4, "cpu"), (None, "tpu"), (4, "tpu")])
def test_loss_and_gradients_equal_torch(case, chunk, platform, monkeypatch):
    monkeypatch.setattr(mesh, "platform", lambda: platform)  # which axis of the logits is the vocabulary
    expected_loss, expected_grads, expected_sums, count = torch_loss(case)
    weights = {name: case[name] for name in ("x_btd", "unembed_dv")}
    value_and_grad = jax.value_and_grad(jax_loss, has_aux=True)
    (loss, (sums, *_)), grads = value_and_grad(weights, case, chunk, jnp.float32(count))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, expected_grads[name], rtol=1e-4, atol=1e-6, err_msg=name)
    for name, expected in expected_sums.items():
        np.testing.assert_allclose(sums[name], expected, rtol=1e-5, err_msg=name)
    assert min(expected_sums["clipped_low"], expected_sums["clipped_high"]) > 0
    assert expected_sums["clipped_low"] + expected_sums["clipped_high"] < count


def test_logprobs_and_entropy_equal_numpy(case):
    weights = {name: case[name] for name in ("x_btd", "unembed_dv")}
    _, (_, logprob_bt, entropy_bt) = jax_loss(weights, case, 8, jnp.float32(1))
    temperature_bt = np.where(case["temperature_bt"] == 0, 1, case["temperature_bt"]).astype(np.float64)
    logits_btv = (case["x_btd"].astype(np.float64) @ case["unembed_dv"])[:, :-1] / temperature_bt[:, 1:, None]
    p_btv = np.exp(logits_btv) / np.exp(logits_btv).sum(-1, keepdims=True)
    chosen_bt = np.take_along_axis(p_btv, case["token_bt"][:, 1:, None], -1)[..., 0]
    mask_bt = case["mask_bt"][:, 1:]
    np.testing.assert_allclose(logprob_bt[:, 1:], np.where(mask_bt, np.log(chosen_bt), 0), rtol=1e-5, atol=1e-6)
    entropy_of_bt = -(p_btv * np.log(p_btv)).sum(-1)
    np.testing.assert_allclose(entropy_bt[:, 1:], np.where(mask_bt, entropy_of_bt, 0), rtol=1e-5)
    np.testing.assert_array_equal(logprob_bt[:, 0], 0)


def test_no_logits_are_made_where_nothing_was_sampled(case):
    """Hidden states that predict no sampled token may be anything: with 4 wanted in each row and chunks of 4."""
    mask_bt = np.zeros((B, T), bool)
    for row, first in enumerate((1, 5, 12)):
        mask_bt[row, first : first + 4] = True
    predicts_bt = np.roll(mask_bt, -1, axis=1)
    weights = {
        "x_btd": np.where(predicts_bt[..., None], case["x_btd"], np.nan).astype(np.float32),
        "unembed_dv": case["unembed_dv"],
    }
    whole = {name: case[name] for name in weights}
    case = case | {"mask_bt": mask_bt}
    value_and_grad = jax.value_and_grad(jax_loss, has_aux=True)
    (loss, (_, logprob_bt, _)), grads = value_and_grad(weights, case, 4, jnp.float32(12))
    (expected_loss, (_, expected_bt, _)), expected = value_and_grad(whole, case, T, jnp.float32(12))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(logprob_bt, expected_bt, rtol=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_products_are_in_the_compute_dtype_and_sums_in_float32(tied, platform, monkeypatch):
    """256 chunks add nearly 4 each to the gradient of one token; added up in bfloat16, they would be 2% off."""
    monkeypatch.setattr(mesh, "platform", lambda: platform)
    config = llama.LlamaConfig(V, D, 1, 1, 1, 1, D, tie_embeddings=tied)
    name, shape = ("embed_vd", (V, D)) if tied else ("unembed_dv", (D, V))
    x_btd = jnp.ones((4, 257, D), jnp.bfloat16)
    token_bt, wanted_bt = jnp.zeros((4, 257), jnp.int32), jnp.arange(257) > 0

    def loss(w):
        arrays = token_bt, jnp.ones((4, 257)), jnp.broadcast_to(wanted_bt, (4, 257))
        return losses.token_logprobs({name: w}, config, x_btd, *arrays, chunk=4)[0].sum()

    lowered = jax.jit(jax.grad(loss)).lower(jnp.zeros(shape, jnp.bfloat16))
    products = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    assert products and all(re.search(r": \(tensor<\S*xbf16>, tensor<\S*xbf16>\)", line) for line in products), products
    gradient = lowered.compile()(jnp.zeros(shape, jnp.bfloat16)).astype(jnp.float32)
    expected_vd = np.outer(1024 * (np.eye(V)[0] - 1 / V), np.ones(D))
    np.testing.assert_allclose(gradient, expected_vd if tied else expected_vd.T, rtol=0.01)


def test_the_whole_batch_of_logits_is_never_made():
    config = llama.LlamaConfig(49152, 8, 1, 1, 1, 1, 8)
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((8, 49152), jnp.float32),
            ((4, 4096, 8), jnp.float32),
            ((4, 4096), jnp.int32),
            ((4, 4096), jnp.float32),
            ((4, 4096), jnp.bool),
        )
    ]

    def loss(unembed_dv, *arrays):
        logprob_bt, entropy_bt = losses.token_logprobs({"unembed_dv": unembed_dv}, config, *arrays)
        return logprob_bt.sum() + entropy_bt.sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    whole = 4 * 4096 * 49152 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 3


def surrogate(ratio, advantage):
    arguments = jnp.log(jnp.float32(ratio)), jnp.float32(0), jnp.float32(advantage)

    def loss(logprob):
        return losses.clipped_surrogate(logprob, *arguments[1:], clip_low=0.2, clip_high=0.3)[0]

    return float(loss(arguments[0])), float(jax.grad(loss)(arguments[0]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # inside the bounds: the gradient of -ratio * advantage
        (1.5, 2.0, -2.6, 0.0),  # a gain beyond 1.3 is not paid for
        (1.5, -2.0, 3.0, 3.0),  # a loss is, without a bound
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),  # a gain below 0.8 is not paid for
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, gradient):
    np.testing.assert_allclose(surrogate(ratio, advantage), (loss, gradient), rtol=1e-6, atol=1e-7)


def test_k3_by_hand():
    # policy 0.5, reference 0.25: r = 0.5, r - log r - 1 = 0.193147; d/dlogprob = 1 - r = 0.5.
    logprob, reference = jnp.log(0.5), jnp.log(0.25)
    np.testing.assert_allclose(losses.kl_divergence(logprob, reference), 0.1931472, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(losses.kl_divergence)(logprob, reference), 0.5, rtol=1e-6)


def test_what_is_masked_cannot_spoil_the_gradient():
    mask_bt = jnp.array([[False, True]])

    def loss(logprob_bt):
        return losses.grpo_loss(
            logprob_bt,
            jnp.array([[0.0, -1.0]]),
            jnp.array([[-jnp.inf, -1.0]]),
            jnp.zeros((1, 2)),
            jnp.ones((1, 2)),
            mask_bt,
            jnp.float32(1),
            **COEFFICIENTS,
        )[0]

    grad_bt = jax.grad(loss)(jnp.array([[1e30, -1.0]]))
    np.testing.assert_allclose(grad_bt, [[0.0, -1.0]], atol=1e-6)
