"""What agents receive and what training returns."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Resource:
    """Where an agent finds the model, and what it may want to know about its rollout.

    Where the server trains several models, `model_api_1`, `model_api_2`, ... are the URLs of each, in the order of its
    configuration, and so is `model_apis` by name (`resource.model_apis["query"]`). Where it trains one, every such URL
    is that model's, and the number or name is kept in the records as the role in which it was asked.

    Attributes:
        model_api: base URL of the first model for this rollout. It speaks the OpenAI and Anthropic dialects, and
            whatever is sent to it is recorded for this rollout; the URL itself is the credential.
        model_name: the first model's identifier. Any name is accepted by `model_api`; another model's means that one.
        task_id: the task's identifier, the same for every sample of that task.
        worker_id: number of the worker process, from 0.
        metadata: what was passed to `train(metadata=...)`; and, whatever that holds, about this rollout `mode`, "train"
            or "evaluate", `rollout_id`, `attempt`, `step` and `policy_version`.
        model_names: all models' identifiers, the first one first.
    """

    model_api: str
    model_name: str
    task_id: str
    worker_id: int
    metadata: dict = field(default_factory=dict)
    model_names: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.model_names = self.model_names or [self.model_name]

    @property
    def model_apis(self) -> dict[str, str]:
        """Base URL by model name; a single model has one for every name."""
        return _ModelApis(self.model_api, self.model_names)

    def __getattr__(self, name: str) -> str:
        number = name.removeprefix("model_api_")
        if number == name or not number.isdecimal() or number.startswith("0"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        names = self.model_names
        if len(names) > 1 and int(number) > len(names):
            raise AttributeError(f"there is no {name}: the server trains {len(names)} models, {', '.join(names)}")
        return f"{self.model_api}/model/{number}"


class _ModelApis(dict):
    """Base URL by model name. A single model has one for every name, which is the role that it is asked in."""

    def __init__(self, model_api: str, names: list[str]):
        self._model_api, self._single = model_api, len(names) == 1
        super().__init__({name: model_api if self._single else f"{model_api}/model/{name}" for name in names})

    def __missing__(self, name: str) -> str:
        if not self._single:
            raise KeyError(f"there is no model {name!r}; there are {', '.join(self)}")
        return f"{self._model_api}/model/{name}"


class Task(dict):
    """One line of the dataset: a dict whose fields are also attributes.

    `task["x"]` always gives the field. `task.x` gives the field too, unless a dict has a method of that name (`keys`,
    `items`, `get`, ...).
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this task has no field {name!r}; it has: {', '.join(map(str, self))}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"this task has no field {name!r}") from None

    def __repr__(self) -> str:
        return f"Task({dict.__repr__(self)})"


@dataclass
class Transition:
    """One model call: what went in, what came out, and the reward assigned to it.

    Attributes:
        input: the prompt as the model saw it, chat template and all.
        output: what the model wrote, without the token that ends a turn.
        reward: what the call earned: from intermediate rewards, and for the last one what the agent returned as well.
        metadata: at least `model`, `temperature` and `tool_calls` (in OpenAI's form) where the server recorded it.
        prompt_ids, sampled_ids: the token ids behind `input` and `output`, the end of the turn included.
        logprobs: of each sampled id, natural log, under the distribution it was sampled from.
        policy_version: number of updates behind the weights that sampled.
        attempt: number of the rollout's attempt, from 1.
        finish_reason: "stop", "length" or "cancelled".
    """

    input: str
    output: str
    reward: float = 0.0
    metadata: dict = field(default_factory=dict)
    prompt_ids: list[int] | None = None
    sampled_ids: list[int] | None = None
    logprobs: list[float] | None = None
    policy_version: int | None = None
    attempt: int | None = None
    finish_reason: str | None = None

    def to_dict(self) -> dict:
        """JSON-ready; fields that were never set are left out."""
        printed = {"input": self.input, "output": self.output, "reward": self.reward}
        rest = {name: value for name, value in vars(self).items() if name not in printed}
        return printed | {name: value for name, value in rest.items() if value not in (None, {})}


@dataclass
class Trajectory:
    """One rollout's transitions in order.

    Attributes:
        task_id: the task's identifier, the same for every sample of that task.
        transitions: dicts of `Transition`'s fields are taken too.
        total_reward: the sum of the transitions' rewards unless it is given; None for a failed rollout.
        metadata: `num_steps` and, where the server recorded it, `status` ("succeeded" or "failed"), `job_id`,
            `rollout_id`, `step`, `mode`, `group`, `sample`, `attempt`, `agent_reward` (what the agent returned),
            `cause` and `error` (of a failed rollout) and `duration_s`.
    """

    task_id: str
    transitions: list[Transition]
    total_reward: float | None = None
    metadata: dict = field(default_factory=dict)

    def __post_init__(self):
        self.transitions = [Transition(**t) if isinstance(t, dict) else t for t in self.transitions]
        if self.total_reward is None and self.metadata.get("status") != "failed":
            self.total_reward = float(sum(t.reward for t in self.transitions))

    def to_dict(self) -> dict:
        """JSON-ready, in the form that the API reference prints: `Trajectory(**trajectory.to_dict())` is the same."""
        return {
            "task_id": self.task_id,
            "transitions": [transition.to_dict() for transition in self.transitions],
            "total_reward": self.total_reward,
            "metadata": self.metadata,
        }


@dataclass
class TrainingResult:
    """What `Client.train` returns.

    Attributes:
        final_reward: held-out reward after the last update; without a test set, the last training reward.
        train_rewards: mean reward of the rollouts behind each update, in order.
        test_rewards: mean reward of each evaluation, in order: before the first update, every `eval_interval`
            updates, after the last.
        checkpoints: paths on the server, in step order, of this job's checkpoints that the server still keeps.
        total_steps: number of updates.
        total_time: seconds.
        best_checkpoint: path on the server of the checkpoint with the highest held-out reward, among those that were
            evaluated; None without a test set.
        test_steps: the model's step at each of the evaluations.
        job_id: the job on the server.
        failures: number of training rollouts that failed.
        first_failure: of the first of these its task, cause, error and the line where it was raised; None if none did.
    """

    final_reward: float
    train_rewards: list[float] = field(default_factory=list)
    test_rewards: list[float] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    total_steps: int = 0
    total_time: float = 0.0
    best_checkpoint: str | None = None
    test_steps: list[int] = field(default_factory=list)
    job_id: str = ""
    failures: int = 0
    first_failure: str | None = None

    def plot(self):
        """Both reward curves over the model's step, as a `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from agent_lightning.result_views import figure

        return figure(self)

    def __repr__(self) -> str:
        def curve(rewards: list[float]) -> str:
            if not rewards:
                return "none"
            return f"{rewards[0]:.3f} -> {rewards[-1]:.3f} ({len(rewards)})"

        checkpoints = str(self.checkpoints)
        if len(self.checkpoints) > 1:
            checkpoints = f"[..., {self.checkpoints[-1]!r}] ({len(self.checkpoints)})"
        return (
            f"TrainingResult(final_reward={self.final_reward:.4g}, train_rewards={curve(self.train_rewards)}, "
            f"test_rewards={curve(self.test_rewards)}, total_steps={self.total_steps}, "
            f"total_time={self.total_time:.1f} s, checkpoints={checkpoints}, "
            f"best_checkpoint={self.best_checkpoint!r}"
            + (f", {self.failures} rollouts failed, the first: {self.first_failure}" if self.first_failure else "")
            + ")"
        )

    def _repr_html_(self) -> str:
        from agent_lightning.result_views import training_html

        return training_html(self)


@dataclass
class EvalResult:
    """What `Client.evaluate` returns.

    A rollout that failed (a crash, a time-out, no finite reward) is not a zero: it is left out of every mean, and
    counted in `failures`.

    Attributes:
        mean: of the tasks' rewards.
        standard_error: of that mean, over tasks.
        rewards: each task's reward by task id, with several samples their mean; None where all of them failed.
        failures: number of failed rollouts.
        checkpoint: path on the server of the checkpoint that was evaluated; None for the current weights.
        step: updates behind the weights that were evaluated.
        total_time: seconds.
        samples: with `num_samples`, each task's rewards by task id, None for a failed rollout.
        pass_at_k: with `num_samples`, by k from 1 on, the chance that one of k samples of a task has at least
            `success_threshold` (the unbiased estimator), over the tasks that have k samples.
        job_id: the job on the server.
        first_failure: of the first failed rollout its task, cause, error and the line where it was raised; None if none
            failed.
    """

    mean: float
    standard_error: float
    rewards: dict[str, float | None] = field(default_factory=dict)
    failures: int = 0
    checkpoint: str | None = None
    step: int = 0
    total_time: float = 0.0
    samples: dict[str, list[float | None]] = field(default_factory=dict)
    pass_at_k: dict[int, float] = field(default_factory=dict)
    job_id: str = ""
    first_failure: str | None = None

    def __repr__(self) -> str:
        shown = [k for k in self.pass_at_k if k & (k - 1) == 0 or k == len(self.pass_at_k)]
        parts = [
            f"{self.mean:.4f} +- {self.standard_error:.4f}",
            *(f"pass@{k}={self.pass_at_k[k]:.3f}" for k in shown),
            f"{len(self.rewards)} tasks",
            f"{self.failures} failed" + (f", the first: {self.first_failure}" if self.first_failure else ""),
            f"step {self.step}" + (f" ({self.checkpoint})" if self.checkpoint else ""),
            f"{self.total_time:.1f} s",
        ]
        return f"EvalResult({', '.join(parts)})"

    def _repr_html_(self) -> str:
        from agent_lightning.result_views import evaluation_html

        return evaluation_html(self)
