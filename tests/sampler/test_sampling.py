"""Sampling against the definitions: softmax, top-k and top-p written out with sorts, and chi-square tests."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lightning_jax import mesh
from lightning_jax.sampler import programs
from lightning_jax.sampler.request import noise_key
from lightning_jax.sampler.sampling import rank, sample, uniform_noise


def reference_distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """What to draw from, in float64, by sorting: temperature, then top-k, then the nucleus (arXiv:1904.09751)."""
    x = logits.astype(np.float64) / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0.0
        p /= p.sum()
    before = np.cumsum(p[order]) - p[order]  # the mass of all likelier tokens
    p[order[(before >= top_p) & (top_p < 1.0)]] = 0.0
    p[order[0]] = max(p[order[0]], 1e-300)
    return p / p.sum()


_sample = jax.jit(sample)


def draw(logits: np.ndarray, uniform: np.ndarray, temperature=1.0, top_k=0, top_p=1.0):
    n = len(uniform)
    full = lambda value, dtype: jnp.full(n, value, dtype)  # noqa: E731
    token, logprob = _sample(
        jnp.tile(jnp.asarray(logits, jnp.float32), (n, 1)),
        full(temperature, jnp.float32),
        full(top_k, jnp.int32),
        full(top_p, jnp.float32),
        jnp.asarray(uniform, jnp.float32),
    )
    return np.asarray(token), np.asarray(logprob)


def noise(n: int, *parts) -> np.ndarray:
    key = jnp.asarray([noise_key("test", *parts)], jnp.uint32)
    return np.asarray(uniform_noise(key, jnp.arange(n)[None]))[0]


@pytest.mark.parametrize("vocab", [2, 37, 264, 1500, 4096])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.9, 20, 0.6)]
)
def test_frequencies_match_the_distribution(vocab, temperature, top_k, top_p):
    logits = np.random.default_rng(vocab).normal(size=vocab).astype(np.float32) * 2
    expected = reference_distribution(logits, temperature, top_k, top_p)
    n = 6_000
    token, logprob = draw(logits, noise(n, vocab, top_k), temperature, top_k, top_p)

    assert (expected[token] > 0).all(), "only kept tokens are drawn"
    np.testing.assert_allclose(logprob, np.log(expected[token]), atol=1e-5)
    counts = np.bincount(token, minlength=vocab)
    often = expected * n >= 5
    observed = np.append(counts[often], counts[~often].sum())
    ideal = np.append(expected[often], expected[~often].sum()) * n
    if ideal[-1] < 5:
        observed, ideal = observed[:-1], ideal[:-1] * observed[:-1].sum() / ideal[:-1].sum()
    if len(ideal) > 1:
        assert scipy.stats.chisquare(observed, ideal).pvalue > 1e-4


def test_each_token_gets_the_interval_of_its_probability():
    """The inverse of the distribution function: `uniform` just below and just above a boundary."""
    logits = np.log(np.array([0.5, 0.0, 0.25, 0.125, 0.125], np.float32) + 1e-30)
    token, _ = draw(logits, np.array([0.0, 0.4999, 0.5001, 0.7499, 0.7501, 0.8749, 0.8751, 1 - 2**-24]))
    np.testing.assert_array_equal(token, [0, 0, 2, 2, 3, 3, 4, 4])


def test_extreme_noise_never_draws_a_token_without_probability():
    logits = np.full(1000, -1e9, np.float32)
    logits[[3, 500]] = 0.0
    token, logprob = draw(logits, np.array([0.0, 2**-24, 0.5, 1 - 2**-24]))
    np.testing.assert_array_equal(token, [3, 3, 500, 500])
    np.testing.assert_allclose(logprob, np.log(0.5), atol=1e-6)


def test_greedy_takes_the_first_of_the_likeliest_and_reports_the_plain_softmax():
    logits = np.array([1.0, 3.0, 3.0, -2.0], np.float32)
    token, logprob = draw(logits, np.array([0.0, 0.99]), temperature=0.0, top_k=1, top_p=0.1)
    np.testing.assert_array_equal(token, [1, 1])
    np.testing.assert_allclose(logprob, scipy.special.log_softmax(logits)[1], atol=1e-6)


def test_top_p_zero_and_top_k_one_leave_the_likeliest():
    logits = np.random.default_rng(1).normal(size=300).astype(np.float32)
    for options in ({"top_p": 0.0}, {"top_k": 1}, {"top_p": 1e-6, "top_k": 50}):
        token, logprob = draw(logits, np.array([0.01, 0.99]), **options)
        np.testing.assert_array_equal(token, logits.argmax())
        np.testing.assert_allclose(logprob, 0.0, atol=1e-6)


@pytest.mark.parametrize("vocab", [1500, 4096])
def test_several_bits_at_once_find_the_same_thresholds(vocab, monkeypatch):
    """Accelerators take more than one bit of a threshold from each pass over the vocabulary."""
    n = 32
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n, vocab)).astype(np.float32) * rng.uniform(0.1, 10.0, (n, 1)).astype(np.float32)
    logits[:8] = np.round(logits[:8])  # many of them equal
    top_k = rng.choice([0, 1, 7, 700, vocab], n).astype(np.int32)
    top_p = rng.choice([0.0, 0.01, 0.6, 0.95, 0.999999, 1.0], n).astype(np.float32)
    arguments = logits, np.ones(n, np.float32), top_k, top_p, noise(n, "bits")
    one = jax.jit(sample)(*arguments)
    monkeypatch.setattr(mesh, "platform", lambda: "gpu")
    several = jax.jit(lambda *arguments: sample(*arguments))(*arguments)  # a function that is traced again
    np.testing.assert_array_equal(one[0], several[0])
    np.testing.assert_allclose(one[1], several[1], rtol=0, atol=1e-6)  # sums may be rounded in another order


def test_no_vocabulary_is_reduced_or_sorted_by_xla():
    """On CPU it would make windows of 32 entries of it, in a loop that computes one number at a time; and it sorts a
    vocabulary whose likeliest entries are asked for, unless they are all that is taken from it."""
    rows, vocab = 2, 49152
    row = lambda dtype: jax.ShapeDtypeStruct((rows,), dtype)  # noqa: E731
    filters = [row(dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32)]
    logits, options = jax.ShapeDtypeStruct((rows, vocab), jnp.float32), programs.compiler_options("cpu")
    program = jax.jit(sample, compiler_options=options).lower(logits, *filters, row(jnp.float32)).compile()
    ranking = jax.jit(functools.partial(rank, count=20), compiler_options=options).lower(logits, *filters).compile()
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* reduce-window\(", program.as_text() + ranking.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert sizes, "running sums over blocks and within one are made of windows"
    assert max(sizes) < rows * vocab / 64
    assert " sort(" not in ranking.as_text()


def test_top_k_beyond_the_vocabulary_keeps_all():
    logits = np.random.default_rng(2).normal(size=50).astype(np.float32)
    u = noise(200, "beyond")
    np.testing.assert_array_equal(draw(logits, u, top_k=10_000)[0], draw(logits, u)[0])


def test_rows_do_not_depend_on_each_other():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(32, 264)).astype(np.float32)
    options = [
        rng.choice([0.0, 0.5, 1.0], 32).astype(np.float32),
        rng.choice([0, 3, 40], 32).astype(np.int32),
        rng.choice([0.3, 0.9, 1.0], 32).astype(np.float32),
        rng.random(32).astype(np.float32),
    ]
    token, logprob = _sample(logits, *options)
    for row in range(32):
        t, lp = draw(logits[row], options[3][row : row + 1], *(option[row] for option in options[:3]))
        assert t[0] == token[row]
        np.testing.assert_allclose(lp[0], logprob[row], atol=1e-6)


def test_noise_is_uniform_and_independent_over_positions_and_keys():
    u = np.stack([noise(2000, i) for i in range(20)])
    assert scipy.stats.kstest(u.ravel(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.02
    assert u.min() >= 0.0 and u.max() < 1.0


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_noise_is_what_jax_random_makes_of_key_and_position(platform, monkeypatch):
    monkeypatch.setattr(mesh, "platform", lambda: platform)
    keys = np.array([noise_key(1), noise_key(2), (0, 2**32 - 1)], np.uint32)
    positions = np.array([[0, 1, 5], [7, 2**20, 3], [4, 2**31 - 1, 2]], np.int32)
    for key, row, found in zip(keys, positions, np.asarray(uniform_noise(keys, positions)), strict=True):
        folded = [jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), p) for p in row]
        bits = np.array([jax.random.bits(k, dtype=jnp.uint32) for k in folded])
        np.testing.assert_array_equal(found * 2**24, bits >> 8)


def test_noise_of_a_position_does_not_depend_on_what_is_asked_with_it():
    key = jnp.asarray([noise_key(1), noise_key(2)], jnp.uint32)
    both = np.asarray(uniform_noise(key, jnp.asarray([[5, 6, 7], [5, 6, 7]])))
    assert both[1, 2] == np.asarray(uniform_noise(key[1:], jnp.asarray([[7]])))[0, 0]


def test_noise_keys_are_stable_and_tell_parts_apart():
    assert noise_key(0, 1, "task", 2) == (3530419773, 118676626), "or a resumed run would go another way"
    keys = [noise_key(1, 23), noise_key(12, 3), noise_key("1", 23), noise_key(1, 2, 3), noise_key(123)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= word < 2**32 for key in keys for word in key)
