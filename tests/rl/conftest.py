"""A model small enough to compile in seconds, and rows for it."""

import jax
import numpy as np
import pytest

from lightning_jax.model import llama
from lightning_jax.rl import trajectory


@pytest.fixture(scope="session")
def config() -> llama.LlamaConfig:
    return llama.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_seq_len=64,
    )


@pytest.fixture(scope="session")
def params(config):
    """Larger than an initialisation, so that no gradient is lost in rounding; NumPy, so that nothing donates them."""
    params = llama.init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.05, x.shape).astype(np.float32), params)


@pytest.fixture
def rows(config) -> list[trajectory.Row]:
    """Rows of 12 rollouts: ragged, some with an observation between two replies, some sampled at other temperatures."""
    rng = np.random.default_rng(1)
    rows = []
    for rollout in range(12):
        prompt = rng.integers(config.vocab_size, size=rng.integers(1, 6)).tolist()
        calls = []
        for turn in range(1 + rollout % 2):
            sampled = rng.integers(config.vocab_size, size=rng.integers(1, 8)).tolist()
            logprobs = -rng.random(len(sampled)).astype(np.float32)
            parent = turn - 1 if turn else None
            calls.append(
                trajectory.TokenCall(turn, parent, prompt, sampled, logprobs, temperature=(1, 0.7, 0)[rollout % 3])
            )
            prompt = prompt + sampled + rng.integers(config.vocab_size, size=3).tolist()
        rows += trajectory.build_rows(calls, rollout)
    return rows


@pytest.fixture
def advantages() -> np.ndarray:
    return np.random.default_rng(2).normal(size=12).astype(np.float32)
