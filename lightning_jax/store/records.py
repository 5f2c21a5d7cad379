"""What the store holds, as the rest of the program sees it."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from agent_lightning.exceptions import AgentLightningError, DataUploadError

# A job is over in these states. "stopped" means that somebody asked for it and the work so far was kept.
ENDED_JOB = frozenset({"succeeded", "failed", "stopped"})

# Why an attempt ended without a usable reward. The first three say nothing about the agent's answer and are retried.
RETRIED_CAUSES = frozenset({"crash", "timeout", "lost"})


class StoreError(AgentLightningError):
    """The store could not be read or written (full disk, another process has it open, not a store)."""


class DataError(DataUploadError):
    """A dataset file is not valid; nothing of it was kept.

    Attributes:
        line: 1-based number of the offending line, None when the file as a whole is wrong.
    """

    def __init__(self, message: str, line: int | None = None, *, hint: str | None = None):
        self.line = line
        super().__init__(message, hint=hint)

    def within(self, where: str) -> "DataError":
        """The same, which says in what the line is."""
        text = str(self).removesuffix(f"\n  hint: {self.hint}")
        return DataError(f"{where}, {text}", self.line, hint=self.hint)


class UnknownError(AgentLightningError, KeyError):
    """There is no dataset or job of this name."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """One split of an uploaded dataset."""

    data_id: str
    split: str
    num_tasks: int


@dataclasses.dataclass(frozen=True)
class RolloutEntry:
    """One rollout to be run: `sample` counts the rollouts of one task within a step, `group` is what they share.

    `greedy`: where the agent gives no temperature it is 0.
    """

    task_id: str
    task_index: int
    group: int
    sample: int
    task: dict
    greedy: bool = False


@dataclasses.dataclass(frozen=True)
class CallRecord:
    """One model call of an attempt, exactly as it was sampled.

    Attributes:
        index: the call's number within its attempt, by arrival (`Store.next_call_index`).
        prompt_ids: [T] int32 token ids the model was given (a list before it is stored, an array afterwards).
        sampled_ids: [n] int32 token ids it sampled, the end-of-turn id included.
        logprobs: [n] float32 natural-log probabilities under the distribution sampled from.
        parent: the call whose prompt and sample this prompt begins with: its `index` while the attempt runs, its
            position in `RolloutRecord.calls` afterwards; None for a fresh prompt.
        temperature, top_p, top_k: the sampling parameters in force.
        constrained: the tokens were not drawn from the policy's own distribution, see `SamplingParams.constrained`.
        policy_version: version of the weights when sampling began.
        last_policy_version: of those that sampled the last token, where weights were published meanwhile; else None.
        finish_reason: "stop", "length" or "cancelled".
        model: name of the policy that sampled.
        role: what the model was asked as: its name where there are several; else what the agent's URL said, "1" by
            default.
        reward: what this call alone earned (AIR); the agent's return is the rollout's, not the call's.
        messages, tools, reply: the canonical request and the assistant message returned for it.
        request: whatever else the dialect wants kept (its name, stop strings, tool choice).
    """

    prompt_ids: Sequence[int]
    sampled_ids: Sequence[int]
    logprobs: Sequence[float]
    parent: int | None = None
    temperature: float = 1.0
    policy_version: int = 0
    finish_reason: str = "stop"
    reward: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    index: int = 0
    model: str = ""
    role: str = "1"
    messages: Sequence[dict] = ()
    tools: Sequence[dict] | None = None
    reply: dict = dataclasses.field(default_factory=dict)
    request: dict = dataclasses.field(default_factory=dict)
    constrained: bool = False
    last_policy_version: int | None = None

    @property
    def prompt_text(self) -> str | None:
        """The prompt, where it was a text to be written on; None where it was a chat or token ids."""
        return self.request.get("prompt")


@dataclasses.dataclass(frozen=True)
class RolloutRecord:
    """A rollout that has ended, with the calls of its last attempt only.

    Attributes:
        status: "succeeded" or "failed".
        cause: why it failed: "crash", "timeout", "lost", "exception" or "invalid_reward"; None when it succeeded.
        reward: the agent's return, None when it failed.
        error, traceback: "Type: message" and the worker's traceback, None when it succeeded.
        attempt: number of the attempt that ended it, from 1.
    """

    rollout_id: int
    task_id: str
    task_index: int
    group: int
    sample: int
    step: int
    mode: str
    status: str
    cause: str | None
    reward: float | None
    error: str | None
    traceback: str | None
    attempt: int
    duration_s: float
    calls: list[CallRecord]


@dataclasses.dataclass(eq=False, slots=True)
class Attempt:
    """One attempt at a rollout while a worker holds it. Lives in memory only; its token is its credential.

    Attributes:
        calls: the calls recorded so far, in the order in which they ended.
        prompts: for each prompt, by digest, the numbers its samples have taken; they name a call's noise, whatever the
            order in which concurrent calls arrive.
        on_result: called when the agent has returned, before the attempt ends; calls may still be recorded.
        on_end: called, by request id, when the attempt ends while a model call is in flight.
        deadline: `time.monotonic()` after which the attempt counts as timed out.
        arrived: its pool has named it among what it runs.
    """

    attempt_id: int
    rollout_id: int
    job_id: str
    number: int
    pool_id: str
    lease_id: str
    token: str
    mode: str
    step: int
    seed: int
    entry: RolloutEntry
    metadata: dict[str, Any]
    timeout_s: float
    granted: float
    deadline: float
    arrived: bool = False
    ended: bool = False
    calls: list[CallRecord] = dataclasses.field(default_factory=list)
    prompts: dict[bytes, set[int]] = dataclasses.field(default_factory=dict)
    on_result: list[Callable[[], Any]] = dataclasses.field(default_factory=list)
    on_end: dict[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)
    arrivals: itertools.count = dataclasses.field(default_factory=itertools.count)
