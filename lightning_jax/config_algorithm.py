"""The section `algorithm` of the configuration: its settings, and which of them go together."""

from typing import Any

from ml_collections import config_dict


def default() -> config_dict.ConfigDict:
    """The section with its defaults."""
    algorithm = config_dict.ConfigDict()
    algorithm.name = "grpo"  # or "ppo", "rloo", "reinforce++", "reinforce++-baseline"
    algorithm.group_size = 8  # rollouts of each task in a step
    algorithm.learning_rate = 5e-7  # AdamW, after the warm-up
    algorithm.warmup_steps = 0  # updates over which the learning rate rises linearly from 0
    algorithm.lr_schedule = "constant"  # after the warm-up; or "linear", "cosine": down to ...
    algorithm.lr_min_ratio = 0.0  # ... this part of the learning rate ...
    algorithm.lr_decay_steps = 0  # ... after so many updates, warm-up included, where it stays; 0: runtime.total_steps
    algorithm.weight_decay = 0.0  # AdamW's, on matrices alone
    algorithm.adam_b1 = 0.9
    algorithm.adam_b2 = 0.999
    algorithm.max_grad_norm = 1.0  # the gradient's global norm is clipped to this
    algorithm.kl_coef = 0.001  # weight of KL(policy || initial model) in the loss; at 0 no reference is kept
    algorithm.kl_in_reward = config_dict.placeholder(bool)  # KL in the reward; None: only with "reinforce++"
    algorithm.kl_estimator = config_dict.placeholder(str)  # "k1", "k2", "k3", "k3+"; None: k3, and k1 in the reward
    algorithm.scale_rewards = "group"  # GRPO's returns are divided by the deviation of "group", "batch" or "none"
    algorithm.loss_mode = "clip"  # "gspo": the ratios of whole rows; "cispo": every token keeps its gradient
    algorithm.loss_aggregation = "token-mean"  # or "seq-mean-token-mean", "seq-mean-token-sum", "constant"
    algorithm.clip_range = 0.2  # the probability ratio is clipped to 1 +- this
    algorithm.clip_low = config_dict.placeholder(float)  # below and above 1, in place of clip_range
    algorithm.clip_high = config_dict.placeholder(float)
    algorithm.dual_clip = config_dict.placeholder(float)  # the ratio at which the loss of negative advantages ends
    algorithm.gamma = config_dict.placeholder(float)  # "reinforce++", "ppo": discount of a token; None: 1
    algorithm.entropy_coef = 0.01  # weight of the entropy bonus
    # Weights for the sampler's difference from the learner: "token_truncate", "token_mask", or "sequence_" and either.
    algorithm.importance_correction = "none"
    algorithm.importance_cap = 2.0  # the largest of its weights
    algorithm.mask_truncated = False  # calls cut off at max_tokens are not trained on
    algorithm.overlong_buffer = 0  # last tokens before max_tokens over which a call's reward falls by up to 1
    algorithm.filter_groups = False  # groups whose rewards are all the same are left out of the update ...
    algorithm.max_gen_batches = 1  # ... and replaced by other tasks' until so many batches of rollouts were sampled
    algorithm.credit = "trajectory"  # every call has the trajectory's advantage; "step": each by the rewards from it on
    algorithm.shuffle_rewards = False  # a control: rewards change places within the batch, so nothing can be learned
    algorithm.ppo_epochs = 1  # passes of an update over its rows
    algorithm.mini_batches = 1  # optimizer steps in each pass, with a part of the rows each
    algorithm.actor_lr = config_dict.placeholder(float)  # PPO alone, like those below; None: learning_rate
    algorithm.critic_lr = config_dict.placeholder(float)  # None: 1e-5
    algorithm.critic = config_dict.placeholder(str)  # "copy": a trunk of its own; "shared": it reads the policy's
    algorithm.critic_warmup = config_dict.placeholder(int)  # first updates, in which only the critic learns; None: 0
    algorithm.gae_lambda = config_dict.placeholder(float)  # None: 0.95
    algorithm.value_clip = config_dict.placeholder(float)  # how far an update may move a value; None: 0.2
    return algorithm


# Settings that other algorithms than these have no use for.
_USED_BY = {
    "credit": ("grpo",),
    "scale_rewards": ("grpo",),
    "filter_groups": ("grpo", "rloo", "reinforce++-baseline"),
    "gamma": ("reinforce++", "ppo"),
} | {name: ("ppo",) for name in ("actor_lr", "critic_lr", "critic", "critic_warmup", "gae_lambda", "value_clip")}


def decay_updates(config: config_dict.ConfigDict) -> int:
    """The number of updates after which the learning rate has come down; 0 if it never does."""
    if config.algorithm.lr_schedule == "constant":
        return 0
    return config.algorithm.lr_decay_steps or config.runtime.total_steps


def contradiction(config: config_dict.ConfigDict) -> tuple[str, str, str] | None:
    """(key, what is wrong with it, a hint) if the algorithm's settings do not go together."""
    a, unset = config.algorithm, default()

    def is_set(name: str) -> bool:
        return a[name] != unset[name]

    def wrong(name: str, problem: str, hint: str = "remove it") -> tuple[str, str, str]:
        return f"algorithm.{name}", problem, hint

    for name, algorithms in _USED_BY.items():
        if is_set(name) and a.name not in algorithms:
            users = "PPO's" if algorithms == ("ppo",) else f"a setting of {_listed(algorithms)}"
            return wrong(name, f"is {users}, and algorithm.name is {a.name!r}")
    if a.credit == "step" and (is_set("scale_rewards") or a.kl_in_reward):
        name = "scale_rewards" if is_set("scale_rewards") else "kl_in_reward"
        return wrong(name, "does not go with algorithm.credit 'step', which scales returns by their group")
    if a.credit == "step" and a.filter_groups:
        return wrong("filter_groups", "goes by total rewards, and algorithm.credit 'step' by those from each call on")
    rises = a.warmup_steps + (a.critic_warmup or 0)
    for name in ("lr_min_ratio", "lr_decay_steps"):
        if is_set(name) and a.lr_schedule == "constant":
            hint = "remove it, or set lr_schedule to 'linear' or 'cosine'"
            return wrong(name, "is without effect where algorithm.lr_schedule is 'constant'", hint)
    if a.lr_schedule != "constant" and not decay_updates(config):
        hint = "set algorithm.lr_decay_steps or runtime.total_steps"
        return wrong("lr_schedule", f"{a.lr_schedule!r} needs to know at which update it ends", hint)
    if a.lr_schedule != "constant" and decay_updates(config) <= rises:
        problem = f"{a.lr_schedule!r} ends at update {decay_updates(config)}, and the warm-up takes {rises}"
        return wrong("lr_schedule", problem, "set algorithm.lr_decay_steps higher, or warmup_steps lower")
    if a.dual_clip is not None and a.loss_mode != "clip":
        return wrong("dual_clip", f"bounds the ratio of loss_mode 'clip', and it is {a.loss_mode!r}")
    if a.kl_in_reward and not a.kl_coef:
        return wrong("kl_in_reward", "is without effect where algorithm.kl_coef is 0", "remove it, or set kl_coef")
    if is_set("kl_estimator") and not a.kl_coef:
        return wrong("kl_estimator", "is without effect where algorithm.kl_coef is 0", "remove it, or set kl_coef")
    if a.importance_correction != "none" and (config.sampler.top_p < 1 or config.sampler.top_k):
        problem = "weighs tokens by their whole distribution, of which sampler.top_p and top_k leave a part"
        return wrong("importance_correction", problem, "remove it, or sampler.top_p and sampler.top_k")
    if a.overlong_buffer > config.sampler.max_tokens:
        problem = f"must be at most sampler.max_tokens ({config.sampler.max_tokens}), not {a.overlong_buffer}"
        return wrong("overlong_buffer", problem, "set it lower: it is the part of a reply that is punished")
    if is_set("importance_cap") and a.importance_correction == "none":
        return wrong("importance_cap", "bounds the weights of algorithm.importance_correction, which is 'none'")
    if is_set("max_gen_batches") and not a.filter_groups:
        return wrong("max_gen_batches", "is for algorithm.filter_groups, which is off", "set filter_groups too")
    return None


def _listed(names: Any) -> str:
    return " and ".join(map(repr, names))
