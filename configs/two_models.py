"""Two copies of the model that ships with the package learn, from one reward, to answer what neither could alone."""

from lightning_jax import config as config_lib


def get_config():
    config = config_lib.default_config()
    config.mode = "train"
    config.workdir = "runs/two-models-seed{seed}"

    config.models = {"query": {"path": "builtin:tiny"}, "answer": {"path": "builtin:tiny"}}
    config.algorithm.group_size = 8
    config.algorithm.learning_rate = 2e-4
    config.algorithm.kl_coef = 0.001
    config.algorithm.entropy_coef = 0.0
    config.runtime.max_seq_len = 64
    config.runtime.batch_size = 128  # 16 tasks x 8 rollouts
    config.runtime.gradient_accumulation = 1
    config.runtime.total_steps = 24
    config.runtime.eval_interval = 4
    config.runtime.checkpoint_interval = 8
    config.runtime.remat = "none"

    config.sampler.max_slots = 16
    config.sampler.kv_cache_tokens = 2048
    config.sampler.page_size = 8
    config.sampler.decode_steps = 4
    config.sampler.prefill_chunk = 32

    config.agent.script = "scripts/agents/lookup.py"
    config.agent.nworkers = 16
    config.agent.rollout_timeout_s = 60.0
    config.data.train_file = "scripts/agents/data/lookup_train.jsonl"
    config.data.test_file = "scripts/agents/data/lookup_test.jsonl"
    config.server.port = 0
    return config
