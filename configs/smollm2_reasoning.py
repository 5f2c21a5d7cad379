"""Trains SmolLM2-135M-Instruct to add and subtract digits, on tasks from reasoning-gym. See the README."""

from lightning_jax import config as config_lib


def get_config():
    config = config_lib.default_config()
    config.mode = "train"
    config.workdir = "runs/smollm2-reasoning-seed{seed}"

    config.model.path = "models/smollm2-135m-instruct.gguf"
    config.algorithm.group_size = 8
    config.algorithm.learning_rate = 1e-5
    config.algorithm.kl_coef = 0.001
    config.algorithm.entropy_coef = 0.0
    config.runtime.max_seq_len = 256
    config.runtime.batch_size = 32  # 4 tasks x 8 rollouts
    config.runtime.gradient_accumulation = 2
    config.runtime.remat = "none"
    config.runtime.total_steps = 20
    config.runtime.eval_interval = 10
    config.runtime.checkpoint_interval = 10
    config.runtime.max_to_keep = 1  # 1.6 GB each

    config.sampler.max_slots = 32
    config.sampler.kv_cache_tokens = 8192
    config.sampler.page_size = 16
    config.sampler.decode_steps = 4
    config.sampler.prefill_chunk = 64

    config.agent.script = "scripts/agents/reasoning.py"
    config.agent.nworkers = 16
    config.data.train_file = "runs/reasoning/train.jsonl"
    config.data.test_file = "runs/reasoning/test.jsonl"
    config.server.port = 0
    return config
