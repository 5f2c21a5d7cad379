"""What rollouts came to: rewards and metrics of a step and of an evaluation."""

import collections
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from agent_lightning.exceptions import TrainingError
from lightning_jax.store import CallRecord, RolloutRecord

# Of the files in a worker's stack: Python's own, installed packages, and what calls the agent.
_NOT_THE_AGENTS = re.compile(r"^<frozen |/lib\d*/python3|/agent_lightning/(agent_source|worker|runtime/\w+)\.py$")


def total_reward(record: RolloutRecord) -> float:
    """What the agent returned plus what its calls earned on the way; NaN for a failed rollout."""
    return math.nan if record.reward is None else record.reward + sum(call.reward for call in record.calls)


def mean(value_n: np.ndarray) -> float:
    """Mean over the finite values, in float64; NaN without any."""
    finite_n = value_n[np.isfinite(value_n)].astype(np.float64)
    return float(finite_n.mean()) if len(finite_n) else math.nan


def check_failures(step: int, records: Sequence[RolloutRecord]) -> None:
    """Raises TrainingError where more than half of a step's rollouts failed."""
    failed = [record for record in records if record.status == "failed"]
    if 2 * len(failed) > len(records):
        first = failed[0]
        raise TrainingError(
            f"{len(failed)} of {len(records)} rollouts of step {step} failed; the first ({first.task_id}): "
            f"{first.cause}: {first.error}\n{first.traceback or ''}"
        )


def rollout_metrics(records: list[RolloutRecord], return_n: np.ndarray, group_n: np.ndarray) -> dict[str, float]:
    """A training step's, from its rollouts, their total rewards (NaN for a failed one) and their groups."""
    finite_n = return_n[np.isfinite(return_n)].astype(np.float64)
    groups = [return_n[(group_n == g) & np.isfinite(return_n)] for g in np.unique(group_n)]
    flat = [np.ptp(group) == 0 for group in groups if len(group) > 1]
    causes = collections.Counter(record.cause for record in records if record.status == "failed")
    succeeded = [record for record in records if record.status == "succeeded"]
    on_the_way = [sum(call.reward for call in record.calls) for record in succeeded]
    of_agent_n = np.array([record.reward for record in succeeded], np.float64)
    return {
        "reward/mean": mean(return_n),
        "reward/std": float(finite_n.std()) if len(finite_n) else math.nan,
        "reward/agent_mean": mean(of_agent_n),
        "reward/agent_std": float(of_agent_n.std()) if succeeded else math.nan,
        "reward/intermediate_mean": float(np.mean(on_the_way)) if on_the_way else 0.0,
        "reward/intermediate_std": float(np.std(on_the_way)) if on_the_way else 0.0,
        "reward/zero_variance_groups": float(np.mean(flat)) if flat else math.nan,
        "rollout/count": len(records),
        "rollout/failed": sum(causes.values()),
        **completion_metrics([call for record in records for call in record.calls]),
        **{f"rollout/failed_{cause}": count for cause, count in causes.items()},
    }


def source_metrics(return_n: np.ndarray, source_n: Sequence[str | None]) -> dict[str, float]:
    """Mean and standard deviation of the total rewards by the tasks' `source`; nothing for tasks that have none."""
    names = {source: re.sub(r"[^a-z0-9_.-]", "_", source.lower()) for source in source_n if source}
    found = {}
    for name in sorted(set(names.values())):
        reward_m = return_n[[names.get(source) == name for source in source_n]].astype(np.float64)
        reward_m = reward_m[np.isfinite(reward_m)]
        found[f"reward/source/{name}/mean"] = mean(reward_m)
        found[f"reward/source/{name}/std"] = float(reward_m.std()) if len(reward_m) else math.nan
    return found


def staleness_metrics(calls: Sequence[CallRecord], version: int) -> dict[str, float]:
    """How many updates old the weights were that sampled, at the update whose weights are `version`."""
    ages = [version - call.policy_version for call in calls]
    return {
        "rollout/staleness_mean": float(np.mean(ages)) if ages else 0.0,
        "rollout/staleness_max": max(ages, default=0),
        "rollout/mixed_calls": sum(call.last_policy_version is not None for call in calls),
    }


def sample_table(records: list[RolloutRecord], decode: Callable[[CallRecord], str], count: int = 4) -> list[dict]:
    """Some of a step's rollouts to look at, from the lowest total reward to the highest: task, reward, last reply."""
    called = sorted((r for r in records if r.status == "succeeded" and r.calls), key=total_reward)
    chosen = np.unique(np.linspace(0, len(called) - 1, count).round().astype(int)) if called else []
    return [
        {
            "task_id": called[i].task_id,
            "rollout_id": called[i].rollout_id,
            "reward": total_reward(called[i]),
            "completion": decode(called[i].calls[-1]),
        }
        for i in chosen
    ]


def completion_metrics(calls: list[CallRecord]) -> dict[str, float]:
    """Of model calls: how many, how many of them under a grammar or the like, how long, and how many were cut off."""
    lengths = [len(call.sampled_ids) for call in calls]
    truncated = [call.finish_reason == "length" for call in calls]
    return {
        "rollout/calls": len(lengths),
        "rollout/constrained_calls": sum(call.constrained for call in calls),
        "completion/mean_tokens": float(np.mean(lengths)) if lengths else 0.0,
        "completion/max_tokens": max(lengths, default=0),
        "completion/truncated_fraction": float(np.mean(truncated)) if truncated else 0.0,
    }


def first_failure(records: list[RolloutRecord]) -> str | None:
    """Of the first failed rollout the task, the cause, the error and the line where it was raised, in one line.

    Of a rollout that hung or crashed it is the agent's line that the worker was at, if the worker printed its stack.
    """
    failed = next((record for record in records if record.status == "failed"), None)
    if failed is None:
        return None
    error = (failed.error or "").partition("\n")[0][:500]
    trace = failed.traceback or ""
    raised = re.findall(r'File "(.*?)", line (\d+)(?:, in (\S+))?', trace)[-1:]
    stack = re.findall(r'File "(.*?)", line (\d+) in (\S+)', trace)  # faulthandler's: the innermost frame comes first
    frames = [frame for frame in stack if not _NOT_THE_AGENTS.search(frame[0])] or stack or raised
    where = ""
    if frames:
        path, line, function = frames[0]
        where = f" ({path}, line {line}{f', in {function}' if function else ''})"
    return f"{failed.task_id}: {failed.cause}: {error}{where}"


def samples_by_task(records: list[RolloutRecord]) -> dict[str, list[float]]:
    """The rewards of each task's rollouts, NaN where one failed."""
    samples: dict[str, list[float]] = {}
    for record in records:
        samples.setdefault(record.task_id, []).append(total_reward(record))
    return samples


def mean_or_none(rewards: list[float]) -> float | None:
    """Mean over the finite values; None without any."""
    value = mean(np.array(rewards))
    return value if math.isfinite(value) else None


def evaluation_metrics(records: list[RolloutRecord]) -> dict[str, float]:
    """The mean over tasks of each task's mean reward, and its standard error: a task's samples are not independent."""
    reward_n = np.array([mean(np.array(rewards)) for rewards in samples_by_task(records).values()])
    survivors = int(np.isfinite(reward_n).sum())
    spread = float(np.nanstd(reward_n, ddof=1)) if survivors > 1 else 0.0
    return {
        "eval/reward": mean(reward_n),
        "eval/standard_error": spread / math.sqrt(max(survivors, 1)),
        "eval/count": len(reward_n),
        "eval/failed": sum(record.reward is None for record in records),
    }
