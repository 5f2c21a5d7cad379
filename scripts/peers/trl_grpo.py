"""The peer's side of `bench_peers.py --peer=trl`: updates by TRL's GRPOTrainer, in the peer's environment.

    python trl_grpo.py SPEC.json RESULT.json

What TRL has as default and our side does not is set to ours where it would change what is learned: dropout (the model
has none), bfloat16, a learning rate that falls, and importance weights on the divergence's gradient. Gradient
checkpointing, TRL's default, costs it time and is off unless the spec says otherwise. Our side recomputes all but
matrix products.
"""

import json
import pathlib
import sys
import time

import datasets
import torch
import transformers
import trl

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "agents"))

import reasoning


def main() -> None:
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    rows = [{"prompt": reasoning.messages(task), "task": json.dumps(task)} for task in spec["tasks"]]
    forced = {"min_new_tokens": spec["new_tokens"]} if spec["ignore_eos"] else {}
    batch = spec["prompts"] * spec["group"]
    config = trl.GRPOConfig(
        output_dir=spec["folder"],
        max_steps=spec["steps"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_generations=spec["group"],
        max_completion_length=spec["new_tokens"],
        generation_kwargs=forced,
        temperature=1.0,
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=spec["kl_coef"],
        use_bias_correction_kl=False,
        epsilon=0.2,
        loss_type="dapo",  # the mean over all sampled tokens of an update
        scale_rewards="group",
        shuffle_dataset=False,
        gradient_checkpointing=spec["checkpointing"],
        bf16=False,
        use_cpu=True,
        seed=spec["seed"],
        model_init_kwargs={"dtype": "float32"},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock = _Clock()
    trainer = trl.GRPOTrainer(
        model=spec["model"],
        args=config,
        reward_funcs=_rewards,
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[clock],
    )
    trainer._generate_single_turn = clock.timed(trainer._generate_single_turn)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    result = {
        "step_s": clock.step_s,
        "sample_s": clock.sample_s,
        "reward": [float(log["reward"]) for log in logs],
        "completion_tokens": [float(log["completions/mean_length"]) for log in logs],
        "prompt_tokens": len(
            trainer.processing_class.apply_chat_template(
                rows[0]["prompt"], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        ),
        "versions": {module.__name__: module.__version__ for module in (trl, transformers, torch)},
        "threads": torch.get_num_threads(),
    }
    with open(sys.argv[2], "w") as file:
        json.dump(result, file)


def _rewards(completions, task, **_) -> list[float]:
    return [reasoning.score(c[0]["content"], json.loads(t)) for c, t in zip(completions, task, strict=True)]


class _Clock(transformers.TrainerCallback):
    """Seconds of each step, and of the sampling in it."""

    def __init__(self):
        self.step_s, self.sample_s = [], []
        self._before = 0.0

    def on_train_begin(self, args, state, control, **_):
        self._before = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        now = time.perf_counter()
        self.step_s.append(now - self._before)
        self._before = now

    def timed(self, generate):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = generate(*args, **kwargs)
            self.sample_s.append(time.perf_counter() - start)
            return result

        return timed


if __name__ == "__main__":
    main()
