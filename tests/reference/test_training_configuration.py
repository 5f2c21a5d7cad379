"""Training Configuration: the YAML file, and the algorithms' settings."""

import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from agent_lightning import InvalidConfigError
from lightning_jax import config, policy
from lightning_jax.rl import algorithms

from .conftest import ROOT

SERVER_CONFIG = """
# server_config.yaml
model:
  path: "builtin:tiny"
  dtype: "bfloat16"
  tensor_parallel: 4

algorithm:
  name: "grpo"
  learning_rate: 5e-7
  kl_coef: 0.001
  clip_range: 0.2
  entropy_coef: 0.01
  group_size: 8

runtime:
  max_seq_len: 4096
  batch_size: 256
  gradient_accumulation: 4
  checkpoint_interval: 100
"""

grpo_config = {
    "group_size": 8,  # Sample 8 trajectories per task
    "kl_coef": 0.001,  # KL divergence coefficient
    "clip_range": 0.2,  # PPO clipping
    "entropy_coef": 0.01,  # Exploration bonus
}

ppo_config = {
    "critic_lr": 1e-5,  # Critic learning rate
    "actor_lr": 5e-7,  # Actor learning rate
    "gae_lambda": 0.95,  # GAE parameter
    "value_clip": 0.2,  # Value clipping
}


def test_server_configuration(tmp_path):
    path = tmp_path / "server_config.yaml"
    path.write_text(SERVER_CONFIG)
    merged = config.merge(yaml_path=str(path), environ={})
    assert (merged.model.dtype, merged.model.tensor_parallel) == ("bfloat16", 4)
    assert (merged.algorithm.learning_rate, merged.runtime.checkpoint_interval) == (5e-7, 100)
    # The program takes it, on four devices, and says what it needs.
    done = subprocess.run(
        [sys.executable, "-m", "lightning_jax.main", f"--server_config={path}", "--config.mode=plan"],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "everything fits" in done.stdout


def test_grpo_configuration():
    merged = config.merge(environ={}, flag_overrides={f"algorithm.{key}": value for key, value in grpo_config.items()})
    assert {key: merged.algorithm[key] for key in grpo_config} == grpo_config


def test_ppo_configuration(tmp_path):
    """Every value reaches the update."""
    path = tmp_path / "server_config.yaml"
    written = "\n".join(f"  {key}: {value}" for key, value in ppo_config.items())
    path.write_text(SERVER_CONFIG.replace('  name: "grpo"', f'  name: "ppo"\n{written}'))
    merged = config.merge(yaml_path=str(path), environ={})
    learner = policy.learner_settings(merged, jnp.dtype("float32"))
    assert (learner.critic, learner.critic_lr, learner.learning_rate, learner.value_clip) == ("copy", 1e-5, 5e-7, 0.2)
    assert algorithms.settings_of(merged) == algorithms.AlgorithmSettings(
        "ppo", gamma=1.0, gae_lambda=0.95, kl_estimator="k3"
    )


def test_ppo_configuration_belongs_to_ppo():
    overrides = {f"algorithm.{key}": value for key, value in ppo_config.items()}
    with pytest.raises(InvalidConfigError, match="is PPO's, and algorithm.name is 'grpo'"):
        config.merge(environ={}, flag_overrides=overrides)
