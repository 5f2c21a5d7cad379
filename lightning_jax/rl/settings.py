"""What the configuration comes to for one model: the dtype that it computes in, and the settings of its updates."""

import jax
import jax.numpy as jnp
import ml_collections

from lightning_jax import config_algorithm
from lightning_jax.model import lora
from lightning_jax.rl import algorithms, critic
from lightning_jax.rl.update import LearnerSettings


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype to compute in; "auto" is float32 on CPU and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def learner_settings(config: ml_collections.ConfigDict, dtype: jnp.dtype) -> LearnerSettings:
    """What the configuration says of updates."""
    a, r = config.algorithm, config.runtime
    beside_critic = config_algorithm.decay_updates(config) - (a.critic_warmup or 0)
    steps_per_update = a.ppo_epochs * a.mini_batches
    return LearnerSettings(
        learning_rate=a.learning_rate if a.actor_lr is None else a.actor_lr,
        **algorithms.loss_settings(config),
        **{name: a[name] for name in ("max_grad_norm", "weight_decay", "adam_b1", "adam_b2")},
        **{name: a[name] for name in ("lr_schedule", "lr_min_ratio")},
        warmup_steps=a.warmup_steps * steps_per_update,
        decay_steps=max(0, beside_critic) * steps_per_update,
        epochs=a.ppo_epochs,
        optimizer_steps=a.mini_batches,
        gradient_accumulation=r.gradient_accumulation,
        batch_size=r.batch_size,
        max_seq_len=r.max_seq_len,
        remat=None if r.remat == "none" else r.remat,
        offload=r.offload,
        compute_dtype=dtype.name,
        trainable=lora.Trainable.of(config.model),
        **critic.settings_of(a),
    )
