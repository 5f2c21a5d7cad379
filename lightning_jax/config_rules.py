"""What a single setting's value must be; `config.py` holds every value against these rules."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    holds: Callable[[Any], bool]
    text: str  # completes "must be ..."
    choices: tuple[str, ...] = ()


def _at_least(low: float) -> Rule:
    return Rule(lambda v: v >= low, f"at least {low}")


def _one_of(*choices: str) -> Rule:
    text = f"one of {', '.join(map(repr, choices))}" if len(choices) > 1 else f"{choices[0]!r} in this version"
    return Rule(lambda v: v in choices, text, choices)


def _is_pattern(text: str) -> bool:
    try:
        return re.compile(text) is not None
    except re.error:
        return False


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FRACTION = Rule(lambda v: 0 < v < 1, "between 0 and 1")
_POSITIVE = Rule(lambda v: v > 0, "greater than 0")
_DECAY = Rule(lambda v: 0 <= v < 1, "at least 0 and below 1")
_POWER_OF_TWO = Rule(lambda v: v > 0 and v & (v - 1) == 0, "a power of two")
RULES = {
    "mode": _one_of("serve", "train", "evaluate", "plan"),
    "workdir": Rule(bool, "a folder's path"),
    "seed": Rule(lambda v: 0 <= v < 2**31, "at least 0 and below 2**31"),
    "device": _one_of("auto", "cpu", "gpu", "cuda", "tpu"),
    "model.path": Rule(bool, "a Hugging Face folder, a .gguf file, or 'builtin:tiny'"),
    "model.fsdp": Rule(lambda v: v >= 1 or v == -1, "at least 1, or -1 for as many as there are"),
    "model.dtype": _one_of("auto", "float32", "bfloat16"),
    "model.lora_alpha": _POSITIVE,
    "model.lora_targets": Rule(
        lambda v: v == "all-linear" or all(name.strip() in LORA_TARGETS for name in v.split(",")),
        f"'all-linear' or some of {', '.join(LORA_TARGETS)}, with commas between them",
    ),
    "model.frozen": Rule(_is_pattern, "a regular expression"),
    "algorithm.name": _one_of("grpo", "ppo", "rloo", "reinforce++", "reinforce++-baseline"),
    "algorithm.scale_rewards": _one_of("group", "batch", "none"),
    "algorithm.lr_schedule": _one_of("constant", "linear", "cosine"),
    "algorithm.lr_min_ratio": Rule(lambda v: 0 <= v <= 1, "between 0 and 1"),
    "algorithm.loss_mode": _one_of("clip", "gspo", "cispo"),
    "algorithm.loss_aggregation": _one_of("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"),
    "algorithm.kl_estimator": _one_of("k1", "k2", "k3", "k3+"),
    "algorithm.importance_correction": _one_of(
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ),
    "algorithm.importance_cap": _at_least(1),
    "algorithm.clip_low": _FRACTION,
    "algorithm.clip_high": _POSITIVE,
    "algorithm.dual_clip": Rule(lambda v: v > 1, "greater than 1"),
    "algorithm.gamma": Rule(lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "algorithm.credit": _one_of("trajectory", "step"),
    "algorithm.adam_b1": _DECAY,
    "algorithm.adam_b2": _DECAY,
    "algorithm.max_grad_norm": _POSITIVE,
    "algorithm.clip_range": _FRACTION,
    "algorithm.actor_lr": _at_least(0),
    "algorithm.critic_lr": _at_least(0),
    "algorithm.critic": _one_of("copy", "shared"),
    "algorithm.critic_warmup": _at_least(0),
    "algorithm.gae_lambda": Rule(lambda v: 0 <= v <= 1, "between 0 and 1"),
    "algorithm.value_clip": _POSITIVE,
    "runtime.remat": _one_of("none", "dots", "full"),
    "runtime.offload": _one_of("none", "reference", "optimizer", "both"),
    "sampler.page_size": _POWER_OF_TWO,
    "sampler.prefill_chunk": _POWER_OF_TWO,
    "sampler.top_p": Rule(lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "agent.nworkers": Rule(lambda v: v >= 1 or v == -1, "at least 1, or -1 to choose it from cores and slots"),
    "agent.rollout_timeout_s": _POSITIVE,
    "server.host": Rule(bool, "an address to listen on, such as '127.0.0.1' or '0.0.0.0'"),
    "server.port": Rule(lambda v: 0 <= v <= 65535, "between 0 and 65535"),
}
_SMALLEST = {  # section -> smallest value -> names
    "model": {0: "lora_rank", 1: "tensor_parallel"},
    "algorithm": {
        0: "learning_rate warmup_steps lr_decay_steps weight_decay kl_coef entropy_coef overlong_buffer",
        1: "ppo_epochs mini_batches max_gen_batches",
        2: "group_size",
    },
    "runtime": {
        0: "total_steps eval_interval checkpoint_interval max_to_keep max_staleness",
        1: "gradient_accumulation epochs",
        2: "max_seq_len batch_size",
    },
    "sampler": {0: "temperature top_k", 1: "max_slots kv_cache_tokens decode_steps max_queue max_tokens"},
    "agent": {1: "max_attempts"},
    "logging": {0: "samples_every"},
    "distributed": {-1: "process_id", 0: "num_processes"},
}
for _section, _lows in _SMALLEST.items():
    RULES |= {f"{_section}.{name}": _at_least(low) for low, names in _lows.items() for name in names.split()}
