"""Rollouts that have ended, as the API reference prints trajectories: read page by page, for clients and for files."""

import dataclasses
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning_jax.store.records import CallRecord, RolloutRecord, StoreError
from lightning_jax.store.rollouts import ROLLOUT_COLUMNS, read_calls
from lightning_jax.text.tokenizer import Tokenizer

_PAGE = 100  # rollouts that are looked up at a time; their calls are read one rollout after the other


class Reader(Protocol):
    """What rollouts are read from: the store's `Database`, or a `ReadOnly` of another process's."""

    def read(self, sql: str, parameters: Sequence = ()) -> list[tuple]: ...


class ReadOnly:
    """The store at `path`, which another process may be writing.

    Raises:
        StoreError: there is none, or it cannot be read.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path).resolve()  # beside it lies its log, not beside a link to it
        if not self._path.is_file():
            raise StoreError(f"there is no store at {path}", hint="give a run's work directory")
        options = "mode=ro"
        if not os.access(self._path.parent, os.W_OK) and not self._path.with_name(f"{self._path.name}-wal").exists():
            options += "&immutable=1"  # nobody writes it, and SQLite could not make the files of its log beside it
        self._connection = sqlite3.connect(f"{self._path.as_uri()}?{options}", uri=True)

    def read(self, sql: str, parameters: Sequence = ()) -> list[tuple]:
        """Rows as last committed."""
        try:
            return self._connection.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"cannot read the store {self._path}: {error}") from error

    def close(self) -> None:
        self._connection.close()


@dataclasses.dataclass(frozen=True)
class Filter:
    """Which rollouts: those of a job, of a step, of a mode ("train" or "evaluate"); None for all."""

    job_id: str | None = None
    step: int | None = None
    mode: str | None = None


def ended_rollouts(reader: Reader, which: Filter, after: int = 0) -> Iterator[tuple[str, RolloutRecord]]:
    """(job id, rollout) of those that succeeded or failed, by rollout id from `after` (not included) on.

    A rollout's calls are in memory only while it is the current one.
    """
    wanted = {name: value for name, value in dataclasses.asdict(which).items() if value is not None}
    conditions = "".join(f" AND {name} = ?" for name in wanted)
    sql = (
        f"SELECT {ROLLOUT_COLUMNS}, job_id FROM rollouts "
        f"WHERE rollout_id > ? AND status IN ('succeeded', 'failed'){conditions} ORDER BY rollout_id LIMIT {_PAGE}"
    )
    while rows := reader.read(sql, (after, *wanted.values())):
        for *fields, attempt_id, job_id in rows:
            yield job_id, RolloutRecord(*fields, calls=read_calls(reader, attempt_id))
            after = fields[0]


def trajectory(job_id: str, record: RolloutRecord, tokenizers: Mapping[str, Tokenizer]) -> dict[str, Any]:
    """A rollout as JSON, the reference's fields first; see `agent_lightning.Trajectory` for what they mean.

    Every rollout has the same keys, so that files with columns can hold them. The agent's return is added to the last
    transition; with no call at all it is the total alone.

    Args:
        tokenizers: of each model, by name, the first one first.
    """
    transitions = [_transition(call, record.attempt, tokenizers) for call in record.calls]
    if record.reward is not None and transitions:
        transitions[-1]["reward"] += record.reward
    total = sum((transition["reward"] for transition in transitions), 0.0) if transitions else record.reward
    return {
        "task_id": record.task_id,
        "transitions": transitions,
        "total_reward": total if record.reward is not None else None,
        "metadata": {
            "num_steps": len(transitions),
            "status": record.status,
            "job_id": job_id,
            "rollout_id": record.rollout_id,
            "step": record.step,
            "mode": record.mode,
            "group": record.group,
            "sample": record.sample,
            "attempt": record.attempt,
            "agent_reward": record.reward,
            "cause": record.cause,
            "error": record.error,
            "duration_s": record.duration_s,
        },
    }


def _transition(call: CallRecord, attempt: int, tokenizers: Mapping[str, Tokenizer]) -> dict[str, Any]:
    model = call.model if call.model in tokenizers else next(iter(tokenizers))  # older records name none
    tokenizer = tokenizers[model]
    prompt_ids, sampled_ids = [list(map(int, ids)) for ids in (call.prompt_ids, call.sampled_ids)]
    ends_turn = bool(sampled_ids) and sampled_ids[-1] in tokenizer.eos_ids
    return {
        "input": tokenizer.decode(prompt_ids),
        "output": tokenizer.decode(sampled_ids[:-1] if ends_turn else sampled_ids),
        "reward": call.reward,
        "metadata": {
            "model": model,
            "temperature": call.temperature,
            "tool_calls": call.reply.get("tool_calls") or [],
            "top_p": call.top_p,
            "top_k": call.top_k,
            "role": call.role,
            "constrained": call.constrained,
            "last_policy_version": call.last_policy_version,
        },
        "prompt_ids": prompt_ids,
        "sampled_ids": sampled_ids,
        "logprobs": list(map(float, call.logprobs)),
        "policy_version": call.policy_version,
        "attempt": attempt,
        "finish_reason": call.finish_reason,
    }
