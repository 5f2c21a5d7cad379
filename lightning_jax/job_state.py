"""What a running job is told, and what it remembers."""

import dataclasses
import threading
import time
from typing import Any


class StopFlag:
    """Asks a job to end: after the step in hand (`request()`), or at once (`request(now=True)`)."""

    def __init__(self):
        self._after_step = threading.Event()
        self._now = threading.Event()

    def request(self, now: bool = False) -> None:
        self._after_step.set()
        if now:
            self._now.set()

    @property
    def after_step(self) -> bool:
        return self._after_step.is_set()

    @property
    def now(self) -> bool:
        return self._now.is_set()


class Stopped(Exception):
    """The job was asked to end at once."""


@dataclasses.dataclass
class History:
    """What a job has seen so far; saved in every checkpoint and returned as its result.

    Attributes:
        start_step: the policy's step before the job's first update.
        train_rewards: mean reward of each update's rollouts.
        test_rewards: [step, mean reward] of each evaluation.
        time_s: seconds spent, over all restarts.
        tokens: tokens sampled in training rollouts.
        sample_s: seconds spent waiting for training rollouts.
        logprob_diff: mean |sampler - learner| log-prob of the newest update; None where it had nothing to compare.
        failed: training rollouts that failed.
        first_failure: what the first of them failed of, see `outcomes.first_failure`.
    """

    start_step: int = 0
    train_rewards: list[float] = dataclasses.field(default_factory=list)
    test_rewards: list[list[float]] = dataclasses.field(default_factory=list)
    time_s: float = 0.0
    tokens: int = 0
    sample_s: float = 0.0
    logprob_diff: float | None = None
    failed: int = 0
    first_failure: str | None = None

    def is_tested(self, step: int) -> bool:
        """Whether there was an evaluation at this step."""
        return step in (tested for tested, _ in self.test_rewards)

    def result(self, step: int) -> dict[str, Any]:
        """What a job's result says of it when the policy is at `step`."""
        tests = self.test_rewards
        return {
            "eval_reward_before": tests[0][1] if tests else None,
            "eval_reward_after": tests[-1][1] if tests else None,
            "final_reward": tests[-1][1] if tests else (self.train_rewards or [None])[-1],
            "train_rewards": self.train_rewards,
            "test_rewards": [reward for _, reward in tests],
            "test_steps": [int(step) for step, _ in tests],
            "total_steps": step - self.start_step,
            "total_time": self.time_s,
            "sampler_learner_logprob_diff": self.logprob_diff,
            "tokens_per_s": self.tokens / self.sample_s if self.sample_s else 0.0,
            "failed": self.failed,
            "first_failure": self.first_failure,
        }


class Clock:
    """Seconds since it was made, on top of what an earlier part of the run took."""

    def __init__(self, seconds: float):
        self._start = time.monotonic() - seconds

    def seconds(self) -> float:
        return time.monotonic() - self._start
