"""The peer's side of `bench_peers.py --peer=tunix`: updates by Tunix's GRPOLearner, in the peer's environment.

    python tunix_grpo.py SPEC.json RESULT.json

What Tunix has as default and our side does not is set to ours where it would change what is learned: the mean over
each sequence before that over sequences, and a divergence estimated as k1. It recomputes nothing in the backward pass,
our side all but matrix products. Its sampler is its own, in JAX; vLLM and SGLang-JAX, which it can use as well, are for
accelerators.
"""

import importlib.metadata
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import metrics_logger

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "agents"))

import reasoning

MAX_PROMPT = 64  # tokens; the longest prompt has fewer


def main() -> None:
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"])
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    config = _model_config(pathlib.Path(spec["model"]) / "config.json")
    actor, reference = (
        llama3_params.create_model_from_safe_tensors(spec["model"], config, mesh, dtype=jnp.float32) for _ in range(2)
    )
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={
                role: mesh for role in (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
            },
            rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(
                    optax.clip_by_global_norm(1.0), optax.adamw(spec["learning_rate"], weight_decay=0.0)
                ),
                eval_every_n_steps=spec["steps"] + 1,
                max_steps=spec["steps"],
                mini_batch_size=spec["prompts"],
                train_micro_batch_size=spec["prompts"],
                metrics_logging_options=metrics_logger.MetricsLoggerOptions(log_dir=spec["folder"]),
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=spec["new_tokens"],
                max_prompt_length=MAX_PROMPT,
                kv_cache_size=MAX_PROMPT + spec["new_tokens"] + 1,
                temperature=1.0,
                top_p=1.0,
                # An id that no token has: replies go on to their full length.
                eos_tokens=[config.vocab_size] if spec["ignore_eos"] else None,
            ),
        ),
    )
    watch = _Watch(cluster)
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=spec["group"],
            num_iterations=1,
            beta=spec["kl_coef"],
            kl_loss_mode="low_var_kl",
            epsilon=0.2,
            loss_agg_mode="token-mean",
        ),
        reward_fns=watch.rewards,
    )
    prompts = [
        tokenizer.apply_chat_template(reasoning.messages(task), add_generation_prompt=True, tokenize=False)
        for task in spec["tasks"]
    ]
    columns = {"prompts": np.array(prompts), "task": np.array([json.dumps(task) for task in spec["tasks"]])}
    batches = [
        {name: column[i : i + spec["prompts"]] for name, column in columns.items()}
        for i in range(0, len(prompts), spec["prompts"])
    ]
    learner.train(batches)
    watch.starts.append(time.perf_counter())
    result = {
        "step_s": np.diff(watch.starts).tolist(),
        "sample_s": watch.sample_s,
        "reward": watch.reward,
        "completion_tokens": watch.completion_tokens,
        "prompt_tokens": len(tokenizer(prompts[0])["input_ids"]),
        "versions": {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")},
    }
    with open(sys.argv[2], "w") as file:
        json.dump(result, file)


def _model_config(file: pathlib.Path) -> llama3.ModelConfig:
    config = json.loads(file.read_text())
    return llama3.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=int(config["rope_theta"]),
        norm_eps=config["rms_norm_eps"],
        weight_tying=config["tie_word_embeddings"],
    )


class _Watch:
    """Of each step: when its sampling began and how long it took, the mean reward, and the completions' mean length."""

    def __init__(self, cluster: rl_cluster.RLCluster):
        self.starts, self.sample_s, self.reward, self.completion_tokens = [], [], [], []
        self._generate, cluster.generate = cluster.generate, self._timed

    def _timed(self, *args, **kwargs):
        self.starts.append(time.perf_counter())
        output = self._generate(*args, **kwargs)
        self.sample_s.append(time.perf_counter() - self.starts[-1])
        self.completion_tokens.append(float(np.mean([len(tokens) for tokens in output.tokens])))
        return output

    def rewards(self, prompts, completions, task, **_) -> list[float]:
        rewards = [reasoning.score(c, json.loads(t)) for c, t in zip(completions, task, strict=True)]
        self.reward.append(float(np.mean(rewards)))
        return rewards


if __name__ == "__main__":
    main()
