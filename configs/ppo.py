"""The quickstart's task with PPO: a critic beside the policy, token-level advantages, two CPU cores, some minutes."""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.workdir = "runs/ppo-seed{seed}"
    config.algorithm.name = "ppo"
    config.algorithm.actor_lr = 2e-4
    config.algorithm.critic_lr = 1e-3
    config.algorithm.critic = "copy"
    config.algorithm.gae_lambda = 0.95
    config.algorithm.value_clip = 0.2
    config.algorithm.ppo_epochs = 2
    config.algorithm.mini_batches = 2
    config.runtime.total_steps = 36
    return config
