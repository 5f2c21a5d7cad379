"""What `algorithm.name` means: from a step's rows and returns to the advantages that the learner is given.

Each algorithm is one entry of `_ALGORITHMS`. What is per rollout is computed in `advantages.py`, what is per token from
the rows' own arrays: `Row.reward` (what each call earned, at its last token) and, where an algorithm asks `score` for
them, the log-probs of the policy and of the reference.
"""

import dataclasses
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np

from lightning_jax.rl import advantages
from lightning_jax.rl.learner import Scores
from lightning_jax.rl.trajectory import Row


@dataclasses.dataclass(frozen=True)
class AlgorithmSettings:
    """How rewards become advantages; what the update does with them is in `update.LearnerSettings`.

    Attributes:
        name: one of NAMES.
    """

    name: str = "grpo"


def settings_of(config: ml_collections.ConfigDict) -> AlgorithmSettings:
    """What the configuration says of advantages."""
    return AlgorithmSettings(name=config.algorithm.name)


@dataclasses.dataclass(frozen=True)
class Step:
    """One model's part in a training step.

    Attributes:
        rows: of the rollouts that are trained on, in any order.
        return_n: [N] float32, the rollouts' total rewards; NaN or infinite marks a failed one.
        group_n: [N] int32, the group (task) that each rollout belongs to.
        score: what the models say of rows, in their order (`Learner.score`).
    """

    rows: Sequence[Row]
    return_n: np.ndarray
    group_n: np.ndarray
    score: Callable[[Sequence[Row]], list[Scores]]


def prepare(settings: AlgorithmSettings, step: Step) -> tuple[list[Row], np.ndarray]:
    """The rows as `Learner.update` takes them, and [N] float32 advantages of those without advantages of their own."""
    return _ALGORITHMS[settings.name](settings, step)


def _grpo(settings: AlgorithmSettings, step: Step) -> tuple[list[Row], np.ndarray]:
    return list(step.rows), advantages.grpo_advantages(step.return_n, step.group_n)


_ALGORITHMS = {"grpo": _grpo}
NAMES = tuple(_ALGORITHMS)
