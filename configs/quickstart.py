"""Teaches the model that ships with the package to carry when it adds: GRPO, two CPU cores, a few minutes."""

from lightning_jax import config as config_lib


def get_config():
    config = config_lib.default_config()
    config.mode = "train"
    config.workdir = "runs/quickstart-seed{seed}"

    config.model.path = "builtin:tiny"
    config.algorithm.group_size = 8
    config.algorithm.learning_rate = 2e-4
    config.algorithm.kl_coef = 0.001
    config.algorithm.entropy_coef = 0.0
    config.runtime.max_seq_len = 128
    config.runtime.batch_size = 256  # 32 tasks x 8 rollouts
    config.runtime.gradient_accumulation = 1
    config.runtime.total_steps = 48
    config.runtime.eval_interval = 12
    config.runtime.checkpoint_interval = 12
    config.runtime.remat = "none"

    config.sampler.max_slots = 16
    config.sampler.kv_cache_tokens = 4096
    config.sampler.page_size = 8
    config.sampler.decode_steps = 4
    config.sampler.prefill_chunk = 32

    config.agent.script = "scripts/agents/additions.py"
    config.agent.nworkers = 32  # half of them are between calls while the others fill the slots
    config.agent.rollout_timeout_s = 60.0
    config.data.train_file = "scripts/agents/data/additions_train.jsonl"
    config.data.test_file = "scripts/agents/data/additions_test.jsonl"
    config.server.port = 0
    return config
