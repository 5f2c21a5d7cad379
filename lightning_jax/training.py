"""The training loop, readable top to bottom: tasks -> groups -> rollouts -> advantages -> update -> publish.

1. `data.py` gives the step's tasks; `store.py` opens `group_size` rollouts of each.
2. Workers lease the rollouts over HTTP; their model calls are sampled by the engine and recorded in the store.
3. When every rollout has ended, its calls become rows and its reward an advantage within its group.
4. The learner updates, the engine gets the new weights, and every so often a checkpoint and an evaluation follow.

With `runtime.max_staleness` the rollouts of so many further steps are opened before an update, and not more, so that
nothing older is ever trained on: workers go on with them, and the engine samples between the update's micro-batches.
What is in flight when weights are published goes on with the new ones, on the keys and values that it has (PipelineRL,
arXiv:2509.19128): a token's log-prob is of the weights that sampled it, and importance weights are made of those.

Several models learn from the same rollouts: a rollout's advantage counts for the calls that each of them had in it.

A run that was killed goes on from its latest checkpoint: weights, optimizer, data position and history come from there,
and whatever the store and the metrics hold of later steps is discarded first.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from agent_lightning.exceptions import TrainingError
from lightning_jax import data, metrics, outcomes, rows, utilization
from lightning_jax.job_state import Clock, History, StopFlag, Stopped
from lightning_jax.policies import Policies
from lightning_jax.rl import checkpoint
from lightning_jax.store import CallRecord, RolloutEntry, RolloutRecord, Store

_log = logging.getLogger(__name__)

_SILENCE_S = 600.0  # without a word from any worker pool a job ends; pools themselves give up after 300 s


def run_job(
    *, job_id: str, spec: dict, policies: Policies, store: Store, config: ml_collections.ConfigDict, stop: StopFlag
):
    """Runs a training or evaluation job to its end.

    Args:
        job_id: the job in `store`; its events tell whoever follows how far it is.
        spec: kind ("train" or "evaluate"), data_id, and optionally epochs, batch_size (tasks per step), total_steps,
            eval_interval, metadata, rollout_timeout (seconds), max_attempts; for an evaluation also checkpoint (by
            default the current weights) and num_samples (of each task). What is missing comes from `config`.
        policies: trained in place.
        stop: asks it to end early; a training job then saves a checkpoint first unless it must end now.

    Returns:
        The result as `result.json` holds it; for an evaluation, the mean reward and what it is made of.

    Raises:
        TrainingError: more than half of a step's rollouts failed; it carries the first one's traceback.
        Stopped: asked to end at once.
    """
    run = _Run(job_id, spec, policies, store, config, stop)
    return run.train() if spec["kind"] == "train" else run.evaluate_only()


@dataclasses.dataclass
class _Batch:
    """A step's tasks, drawn in the order of steps, and their rollouts once they were opened."""

    tasks: list[data.TaskItem]
    rollout_ids: list[int] | None = None


class _Run:
    """One job: what its steps share."""

    def __init__(self, job_id, spec, policies, store, config, stop):
        self.job_id, self.spec, self.policies = job_id, spec, policies
        self.store, self.config, self.stop = store, config, stop
        self.workdir = pathlib.Path(config.workdir)
        self.data_id = spec["data_id"]
        self.history = History(start_step=policies.step)
        self._ahead: collections.deque[_Batch] = collections.deque()  # of the steps to come
        self._warned_of_silence = False

    # -----------------------------------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        config, policies = self.config, self.policies
        policies.prepare_training()
        tasks_per_step = self.spec.get("batch_size") or config.runtime.batch_size // config.algorithm.group_size
        epochs = self.spec.get("epochs") or config.runtime.epochs
        batches_per_epoch = data.num_batches(self.store.num_tasks(self.data_id, "train"), tasks_per_step, 1)
        total_steps = self.spec.get("total_steps") or config.runtime.total_steps or epochs * batches_per_epoch
        tasks = data.TaskQueue(self.store, self.data_id, tasks_per_step, config.seed)

        with metrics.MetricsWriter(
            self.workdir,
            tensorboard=config.logging.tensorboard,
            wandb_project=config.logging.wandb_project,
            config=config.to_dict(),
        ) as writer:
            self._writer = writer
            self._resume(tasks, writer)
            self._clock = Clock(self.history.time_s)
            first, last = self.history.start_step, self.history.start_step + total_steps
            self.store.update_job(self.job_id, step=policies.step - first, total_steps=total_steps)
            if policies.step and not self._has_checkpoint(policies.step):
                self._checkpoint(policies.step, tasks)  # an earlier job's updates, which no checkpoint holds
            if policies.step == first and not self.history.test_rewards:
                row = self._evaluate(policies.step)
                if row and first == 0:
                    writer.write(0, row)
            elif policies.step > first and not self.history.is_tested(policies.step):
                if self._is_due(policies.step - first, self._eval_interval(), total_steps):
                    self._make_up_evaluation()
            while policies.step < last and not self.stop.after_step:
                step = policies.step + 1
                row = self._step(step, last, tasks)
                self._take_time(row)
                self.store.update_job(self.job_id, step=step - first)
                self.store.add_event(self.job_id, "step", step, row)
                try:
                    if not self.stop.after_step and self._is_due(step - first, self._eval_interval(), total_steps):
                        row |= self._evaluate(step)
                finally:  # a step that is in a checkpoint is in the metrics, also where its evaluation is broken off
                    self._take_time(row)
                    writer.write(step, row)
                if self.stop.after_step or self._is_due(step - first, config.runtime.checkpoint_interval, total_steps):
                    self._checkpoint(step, tasks)
            if self.stop.after_step:
                self._catch_up(first, tasks)
        return self._result()

    def _catch_up(self, first: int, tasks) -> None:
        """Gives the last step of a stopped job the checkpoint and the evaluation that it lacks.

        In this order: what was learned is safe before the evaluation, which may take long.
        """
        step = self.policies.step
        if not self._has_checkpoint(step):
            self._checkpoint(step, tasks)
        self._close_ahead()
        if step > first and not self.history.is_tested(step):
            self._make_up_evaluation()

    def _make_up_evaluation(self) -> None:
        """Adds to the row of the policy's step the evaluation that was broken off, or never came."""
        if made_up := self._evaluate(self.policies.step):
            self._take_time(made_up)
            self._writer.add(self.policies.step, made_up)

    def _take_time(self, row: dict[str, float]) -> None:
        self.history.time_s = row["time/total_s"] = self._clock.seconds()

    def _row_of(self, step: int) -> dict[str, Any]:
        """The step's metrics, as far as they were written."""
        return next((row for row in metrics.read_metrics(self.workdir) if row["step"] == step), {})

    def _resume(self, tasks, writer) -> None:
        """Goes on behind the checkpoint that the policy was restored from, if this job made it; else from the start."""
        saved = self.policies.restored
        if saved is not None and saved["job_id"] == self.job_id and saved["step"] == self.policies.step:
            step, self.history = saved["step"], History(**saved["history"])
            tasks.set_state(saved["tasks"])
            ahead = (tasks.items(indices) for indices in saved.get("ahead", []))
            self._ahead.extend(_Batch(items) for items in ahead if items)
            tested = self._row_of(step).get("eval/reward")  # behind the checkpoint, where the job was stopped
            if tested is not None and step > self.history.start_step and not self.history.is_tested(step):
                self.history.test_rewards.append([step, tested])
            self.store.discard_after(self.job_id, step, tested=self.history.is_tested(step))
            writer.truncate_after(step)
            self._mark_best()  # the job may have been killed before it did
        else:
            self.store.discard_after(self.job_id, -1)  # also the evaluation that the job began with
            writer.truncate_after(self.policies.step or -1)

    def _open_ahead(self, last: int, tasks: data.TaskQueue) -> None:
        """Opens the rollouts of the next step and of those that may be sampled with the weights as they are."""
        done = self.policies.step
        for i in range(min(1 + self.config.runtime.max_staleness, last - done)):
            if i == len(self._ahead):
                self._ahead.append(_Batch(tasks.batch()))
            if self._ahead[i].rollout_ids is None:
                self._ahead[i].rollout_ids = self._open(done + 1 + i, self._ahead[i].tasks, "train")

    def _close_ahead(self) -> None:
        """Takes back the rollouts of steps that will not come; their tasks are in the checkpoint."""
        if self._ahead:
            self.store.cancel_open(self.job_id)

    def _step(self, step: int, last: int, more_tasks: data.TaskQueue) -> dict[str, float]:
        """One update; returns its metrics."""
        start, idle_s = time.monotonic(), self.policies.idle_s
        before = {name: policy.sampler_metrics() for name, policy in self.policies.items()}
        self._open_ahead(last, more_tasks)
        records, tasks = self._training_rollouts(step, self._ahead.popleft(), more_tasks)
        sampled, waited_s = time.monotonic(), self.policies.idle_s - idle_s
        version = self.policies.first.version
        self.history.failed += sum(record.status == "failed" for record in records)
        self.history.first_failure = self.history.first_failure or outcomes.first_failure(records)

        return_n = np.array([outcomes.total_reward(r) for r in records], np.float32)
        group_n = np.array([r.group for r in records], np.int32)
        several = len(self.policies) > 1
        updates = self.policies.update(*rows.of_step(records, self.config, list(self.policies), step))

        sample_s, train_s = sampled - start, time.monotonic() - sampled
        sampling_s = sample_s + (train_s if self.config.runtime.max_staleness else 0.0)
        tokens = sum(len(call.sampled_ids) for record in records for call in record.calls)
        trained_tokens = sum(update["train/tokens"] for update in updates.values())
        differences = [update.get("policy/sampler_learner_logprob_diff") for update in updates.values()]
        self.history.train_rewards.append(outcomes.mean(return_n))
        self.history.tokens += tokens
        self.history.sample_s += sampling_s
        self.history.logprob_diff = max((d for d in differences if d is not None), default=None)
        row = outcomes.rollout_metrics(records, return_n, group_n)
        row |= outcomes.source_metrics(return_n, [tasks[record.group].source for record in records])
        row |= outcomes.staleness_metrics([call for record in records for call in record.calls], version)
        self._show_samples(step, records)
        for name, policy in self.policies.items():
            row |= self._named(name, updates[name] | policy.sampler_metrics())
            row |= self._named(name, policy.step_metrics(before[name], updates[name], sampling_s, train_s))
            if several:
                calls = [call for record in records for call in rows.calls_of(record, name)]
                row |= self._named(name, outcomes.completion_metrics(calls))
        return row | {
            "time/sample_s": sample_s,
            "time/train_s": train_s,
            "time/wait_s": waited_s,
            "sampler/tokens_per_s": tokens / sampling_s,
            "train/tokens_per_s": trained_tokens / train_s,
            **utilization.memory_metrics(),
        }

    def _show_samples(self, step: int, records: list[RolloutRecord]) -> None:
        every = self.config.logging.samples_every
        if not every or (step - 1) % every:
            return
        samples = outcomes.sample_table(records, self._decoded)
        self.store.add_event(self.job_id, "samples", step, {"samples": samples})
        self._writer.write_samples(step, samples)

    def _decoded(self, call: CallRecord) -> str:
        policy = self.policies.get(call.model) or self.policies.first
        return policy.tokenizer.decode(call.sampled_ids)

    def _named(self, name: str, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics of a model under its name, where there are several models."""
        return metrics if len(self.policies) == 1 else {f"{name}/{key}": value for key, value in metrics.items()}

    def _training_rollouts(
        self, step: int, batch: _Batch, more_tasks: data.TaskQueue
    ) -> tuple[list[RolloutRecord], list[data.TaskItem]]:
        """A step's rollouts and their groups' tasks.

        Where `algorithm.max_gen_batches` allows, other tasks take the place of groups that are left out.
        """
        tasks, wanted = batch.tasks, len(batch.tasks)
        records = self._ended(step, batch.rollout_ids, "train")
        for _ in range(self.config.algorithm.max_gen_batches - 1):
            missing = wanted - rows.informative_groups(records, self.config, step)
            more = more_tasks.replacements(missing, tasks) if missing > 0 else []
            if not more:
                break
            records += self._ended(step, self._open(step, more, "train", first_group=len(tasks)), "train", records)
            tasks = tasks + more
        return records, tasks

    def _checkpoint(self, step: int, tasks) -> None:
        path = self.policies.save_checkpoint(
            {
                "job_id": self.job_id,
                "step": step,
                "history": dataclasses.asdict(self.history),
                "tasks": tasks.get_state(),
                "ahead": [[item.task_index for item in batch.tasks] for batch in self._ahead],
                "seed": self.config.seed,
            }
        )
        self.store.add_event(self.job_id, "checkpoint", step, {"path": str(path)})
        if self._best_checkpoint() is None:
            checkpoint.unmark_best(self.policies.checkpoint_dir)  # an earlier job's
        self._mark_best()

    def _best_checkpoint(self) -> pathlib.Path | None:
        """Of this job's checkpoints that were evaluated the one with the highest held-out reward; of equals the first.

        The checkpoint that the job began with is one of them, where an earlier job left it.
        """
        kept = {checkpoint.step_of(path): path for path in self.policies.checkpoints()}
        tested = [(reward, kept[step]) for step, reward in self.history.test_rewards if step in kept]
        return max(tested, key=lambda pair: pair[0])[1] if tested else None

    def _mark_best(self) -> None:
        best = self._best_checkpoint()
        if best is not None:
            checkpoint.mark_best(best)

    def _has_checkpoint(self, step: int) -> bool:
        return (self.policies.checkpoint_dir / f"step-{step}").exists()

    def _eval_interval(self) -> int:
        interval = self.spec.get("eval_interval")
        return self.config.runtime.eval_interval if interval is None else interval

    @staticmethod
    def _is_due(step: int, interval: int, last: int) -> bool:
        return step == last or (interval > 0 and step % interval == 0)

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation
    # -----------------------------------------------------------------------------------------------------------------

    def _evaluate(self, step: int) -> dict[str, float]:
        """Mean reward on the held-out tasks with the current weights; nothing where there are none."""
        records = self._evaluation_records(step)
        if not records:
            return {}
        row = outcomes.evaluation_metrics(records)
        self.history.test_rewards.append([step, row["eval/reward"]])
        self.store.add_event(self.job_id, "evaluation", step, row)
        self._mark_best()
        return row

    def _evaluation_records(self, step: int) -> list[RolloutRecord]:
        splits = {info.split for info in self.store.dataset(self.data_id)}
        if "test" not in splits:
            return []
        source = data.TaskSource(self.store, self.data_id, "test")
        return self._ended(step, self._open(step, [source[i] for i in range(len(source))], "evaluate"), "evaluate")

    def evaluate_only(self) -> dict[str, Any]:
        """Evaluates a checkpoint or the current weights, which are sampled from again afterwards in any case."""
        start = time.monotonic()
        self.store.discard_after(self.job_id, -1)  # of the same job, before the server was started again
        path, sampling = None, contextlib.nullcontext()
        if name := self.spec.get("checkpoint"):
            path = self.policies.find_checkpoint(name)
            sampling = self.policies.sampling_from(path)
        with sampling:
            step = self.policies.first.version
            records = self._evaluation_records(step)
        if not records:
            raise TrainingError("the dataset has no test split to evaluate on", hint="upload one with test_file=")
        samples = outcomes.samples_by_task(records)
        return {
            "rewards": {task_id: outcomes.mean_or_none(rewards) for task_id, rewards in samples.items()},
            "samples": {task_id: [outcomes.mean_or_none([r]) for r in rewards] for task_id, rewards in samples.items()},
            "checkpoint": None if path is None else str(path),
            "total_time": time.monotonic() - start,
            "step": step,
            "first_failure": outcomes.first_failure(records),
        } | {name.removeprefix("eval/"): value for name, value in outcomes.evaluation_metrics(records).items()}

    # -----------------------------------------------------------------------------------------------------------------
    # Both
    # -----------------------------------------------------------------------------------------------------------------

    def _open(self, step: int, tasks: list[data.TaskItem], mode: str, *, first_group: int = 0) -> list[int]:
        """Opens rollouts of these tasks; returns their ids."""
        num_samples = self.spec.get("num_samples")
        samples = self.config.algorithm.group_size if mode == "train" else num_samples or 1
        given = {"policy_version": self.policies.first.version}
        if num_samples is not None:
            given["num_samples"] = num_samples
        greedy = mode == "evaluate" and num_samples is None
        entries = [
            RolloutEntry(item.task_id, item.task_index, group=group, sample=sample, task=item.task, greedy=greedy)
            for group, item in enumerate(tasks, start=first_group)
            for sample in range(samples)
        ]
        rollout_ids = self.store.open_rollouts(
            self.job_id,
            step=step,
            mode=mode,
            entries=entries,
            timeout_s=self.spec.get("rollout_timeout") or self.config.agent.rollout_timeout_s,
            max_attempts=self.spec.get("max_attempts") or self.config.agent.max_attempts,
            metadata=(self.spec.get("metadata") or {}) | given,
            seed=self.config.seed,
        )
        started = {"rollouts": len(rollout_ids), "first_step": self.history.start_step}
        self.store.add_event(self.job_id, f"{mode}_started", step, started)
        return rollout_ids

    def _ended(
        self, step: int, rollout_ids: list[int], mode: str, earlier: Sequence[RolloutRecord] = ()
    ) -> list[RolloutRecord]:
        """What became of rollouts when workers have ended them all; `earlier` are the step's others."""
        self.store.wait(self.job_id, rollout_ids, stop=lambda: self.stop.now or self._is_abandoned())
        if self.policies.error is not None:
            raise TrainingError(f"the device failed: {self.policies.error}") from self.policies.error
        if self.stop.now:
            self.store.cancel_open(self.job_id)
            raise Stopped(f"stopped in step {step}")
        records = self.store.finished(rollout_ids)
        if len(records) < len(rollout_ids):
            raise TrainingError(
                f"no worker pool has asked for this job's rollouts for {_SILENCE_S:.0f} s",
                hint="the client that started it has died, or cannot reach the server",
            )
        failed = [record for record in records if record.status == "failed"]
        for record in failed[:3]:
            _log.warning(
                "rollout %s of %s failed (%s): %s", record.rollout_id, record.task_id, record.cause, record.error
            )
        outcomes.check_failures(step, [*earlier, *records])
        if failed:
            self._warn(step, f"{len(failed)} of {len(records)} rollouts failed; {outcomes.first_failure(records)}")
        if len(failed) < len(records) and not any(r.calls for r in records) and not self._warned_of_silence:
            self._warned_of_silence = True
            lost = "nothing is learned" if mode == "train" else "their rewards say nothing of it"
            refusal = self.store.first_refusal(self.job_id)
            what = "no rollout called the model" if refusal is None else "all calls of the model were refused"
            self._warn(step, f"{what}, so {lost}: {refusal or 'agents must use resource.model_api'}")
        return records

    def _warn(self, step: int, text: str) -> None:
        self.store.add_event(self.job_id, "warning", step, {"text": text})

    def _is_abandoned(self) -> bool:
        """Whether nobody will end the open rollouts: the device is gone, or the workers are."""
        return self.policies.error is not None or self.store.silent_s(self.job_id) > _SILENCE_S

    def _result(self) -> dict[str, Any]:
        """The job's result, also written to `result.json`."""
        best = self._best_checkpoint()
        start_step = self.history.start_step
        paths = [path for path in self.policies.checkpoints() if checkpoint.step_of(path) > start_step]
        result = self.history.result(self.policies.step) | {
            "checkpoints": [str(path) for path in paths],
            "best_checkpoint": None if best is None else str(best),
        }
        if len(self.policies) > 1:
            result["model_checkpoints"] = {name: [str(path / name) for path in paths] for name in self.policies}
        partial = self.workdir / "result.json.partial"
        partial.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(partial, self.workdir / "result.json")
        return result
