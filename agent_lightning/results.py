"""From a job's result, as the server tells it, to what the client returns."""

import math
from collections.abc import Sequence

from agent_lightning import exceptions
from agent_lightning.exceptions import AgentLightningError, RemoteError, TrainingError
from agent_lightning.types import EvalResult, TrainingResult


def training_result(job: dict) -> TrainingResult:
    """What `Client.train` returns for a job that has ended with a result."""
    result = job["result"]
    return TrainingResult(
        final_reward=_float(result["final_reward"]),
        train_rewards=[_float(reward) for reward in result["train_rewards"]],
        test_rewards=[_float(reward) for reward in result["test_rewards"]],
        test_steps=list(result["test_steps"]),
        checkpoints=list(result["checkpoints"]),
        best_checkpoint=result["best_checkpoint"],
        total_steps=result["total_steps"],
        total_time=result["total_time"],
        job_id=job["job_id"],
        failures=result.get("failed", 0),
        first_failure=result.get("first_failure"),
    )


def eval_result(job: dict, success_threshold: float) -> EvalResult:
    """What `Client.evaluate` returns for a job that has ended with a result."""
    result = job["result"]
    sampled = job["spec"].get("num_samples") is not None
    return EvalResult(
        mean=_float(result["reward"]),
        standard_error=_float(result["standard_error"]),
        rewards=result["rewards"],
        failures=result["failed"],
        checkpoint=result["checkpoint"],
        step=result["step"],
        total_time=result["total_time"],
        samples=result["samples"] if sampled else {},
        pass_at_k=pass_at_k(list(result["samples"].values()), success_threshold) if sampled else {},
        job_id=job["job_id"],
        first_failure=result.get("first_failure"),
    )


def pass_at_k(samples: Sequence[Sequence[float | None]], threshold: float = 1.0) -> dict[int, float]:
    """The chance that at least one of k samples of a task succeeds, for every k from 1 to the number of samples.

    The unbiased estimator of Chen et al., "Evaluating Large Language Models Trained on Code", eq. 1, for a task with n
    samples of which c succeeded: 1 - C(n - c, k) / C(n, k). The mean is over the tasks that have at least k samples.

    Args:
        samples: each task's rewards; None is a rollout that failed, which says nothing about the answer and is left
            out.
        threshold: a sample succeeds if its reward is at least this.
    """
    counts = []
    for rewards in samples:
        known = [reward for reward in rewards if reward is not None]
        counts.append((len(known), sum(reward >= threshold for reward in known)))
    found = {}
    for k in range(1, max((n for n, _ in counts), default=0) + 1):
        chances = [1.0 - math.comb(n - c, k) / math.comb(n, k) for n, c in counts if n >= k]
        found[k] = sum(chances) / len(chances)
    return found


def job_error(job: dict) -> TrainingError:
    """Why a job failed, as the exception to raise.

    Args:
        job: a failed job; of it, `error` is "Type: message" and `traceback` the server's.

    Returns:
        For an error of this package, which explains itself, with its message alone, since a printed exception is
        headed by its type; for any other with the type and the traceback too. Its cause is what ended the job.
    """
    unknown = "the server does not say why"
    text = job.get("error") or unknown
    kind, colon, rest = text.partition(": ")
    known = getattr(exceptions, kind, None)
    if not (colon and isinstance(known, type) and issubclass(known, AgentLightningError)):
        error = TrainingError("\n".join(filter(None, [text, job.get("traceback")])))
        error.__cause__ = RemoteError(text)
        return error
    message, _, hint = rest.partition("\n  hint: ")
    error = TrainingError(message or unknown, hint=hint or None)
    if known is not TrainingError:
        error.__cause__ = known(message, hint=hint or None)
    return error


def _float(value: float | None) -> float:
    """JSON has no NaN: it arrives as null."""
    return math.nan if value is None else float(value)
