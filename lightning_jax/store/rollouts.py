"""Rollouts, the leases under which workers run them, and the model calls they make.

A rollout that is waiting or leased lives in memory; what happened to it is written behind. A worker pool speaks to the
store in exchanges: it reports results and what it is running, and takes new leases. A lease ends with a result, when
its rollout is cancelled, or when it is given up: its pool went silent, no longer runs it, or it is long past its time.
A given-up lease and one whose worker crashed or timed out are followed by a new attempt, up to `max_attempts`. A lease
that its pool has never named, although it speaks, got lost with the reply that carried it and does not count.
"""

import collections
import dataclasses
import itertools
import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import orjson

from lightning_jax.store.database import Database
from lightning_jax.store.jobs import Jobs
from lightning_jax.store.records import RETRIED_CAUSES, Attempt, CallRecord, RolloutEntry, RolloutRecord

POOL_SILENCE_S = 30.0  # a pool not heard of for so long is gone
GRANT_GRACE_S = 5.0  # a fresh lease may be missing from its pool's running list: the reply is still on its way
MAX_LOST_REPLIES = 5  # of one rollout; more of them count, or one that no reply can carry would go round for ever
TIMEOUT_GRACE_S = 30.0  # the pool enforces a rollout's time-out; the store does so much later, for pools that do not
_LARGEST_REWARD = float(np.finfo(np.float32).max)
_TICK_S = 0.5
_STALL_S = 5.0  # a tick so late means that this process stood still, and pools could not reach it

# What `RolloutRecord` is made of, in the order of its fields, and the attempt whose calls it has.
ROLLOUT_COLUMNS = (
    'rollout_id, task_id, task_index, "group", sample, step, mode, status, cause, reward, error, traceback, attempt, '
    "duration_s, attempt_id"
)


@dataclasses.dataclass(eq=False, slots=True)
class _Rollout:
    rollout_id: int
    job_id: str
    step: int
    mode: str
    entry: RolloutEntry
    timeout_s: float
    max_attempts: int
    metadata: dict
    seed: int
    attempts: int = 0
    lost_replies: int = 0
    lease: Attempt | None = None


class Rollouts:
    """The rollouts of one database. Arguments as for `Jobs`."""

    def __init__(self, database: Database, jobs: Jobs, changed: threading.Condition, announce: Callable[[], None]):
        self._database, self._jobs, self._changed, self._announce = database, jobs, changed, announce
        database.write(("UPDATE rollouts SET status = 'cancelled' WHERE status = 'open'", [()]))
        database.flush()
        self._rollout_ids = itertools.count(database.newest_id("rollouts") + 1)
        self._attempt_ids = itertools.count(database.newest_id("attempts") + 1)
        self._open: dict[int, _Rollout] = {}
        self._awaited: list[set[int]] = []  # for each `wait`, what is open of it
        self._waiting: dict[str, collections.deque[_Rollout]] = collections.defaultdict(collections.deque)
        self._leases: dict[str, Attempt] = {}
        self._tokens: dict[str, Attempt] = {}
        self._pools: dict[str, float] = {}
        self._heard: dict[str, float] = {}  # when a pool last spoke for a job, or was first expected
        self._ticked = time.monotonic()

    # ---- the training loop's side ----

    def open(self, job_id, *, step, mode, entries, timeout_s, max_attempts, metadata, seed) -> list[int]:
        """See `Store.open_rollouts`."""
        rows, rollouts = [], []
        for entry in entries:
            rollout_id = next(self._rollout_ids)
            rollouts.append(
                _Rollout(rollout_id, job_id, step, mode, entry, timeout_s, max_attempts, dict(metadata or {}), seed)
            )
            names = (entry.task_id, entry.task_index, entry.group, entry.sample, json.dumps(entry.task))
            rows.append((rollout_id, job_id, step, mode, *names, "open", 0))
        columns = 'rollout_id, job_id, step, mode, task_id, task_index, "group", sample, task, status, attempt'
        with self._changed:
            self._database.write((f"INSERT INTO rollouts ({columns}) VALUES ({', '.join('?' * 11)})", rows))
            self._open.update((rollout.rollout_id, rollout) for rollout in rollouts)
            self._waiting[job_id].extend(rollouts)
            self._heard.setdefault(job_id, time.monotonic())
            self._changed.notify_all()
        self._announce()
        return [rollout.rollout_id for rollout in rollouts]

    def wait(self, job_id, rollout_ids, stop=None, progress=None) -> None:
        """See `Store.wait`."""
        wanted, reported = set(rollout_ids), None
        with self._changed:
            left = wanted & self._open.keys()
            self._awaited.append(left)
        try:
            while True:
                self._database.check()
                self.reclaim()
                with self._changed:
                    if len(wanted) - len(left) == reported:
                        self._changed.wait(_TICK_S)
                    done = len(wanted) - len(left)
                if progress is not None and done != reported:
                    progress(done)
                reported = done
                if done == len(wanted) or (stop is not None and stop()):
                    return
        finally:
            with self._changed:
                self._awaited = [other for other in self._awaited if other is not left]

    def finished(self, rollout_ids: Sequence[int]) -> list[RolloutRecord]:
        """See `Store.finished`."""
        self._database.flush()
        records = []
        for rollout_id in rollout_ids:
            sql = f"SELECT {ROLLOUT_COLUMNS} FROM rollouts WHERE rollout_id = ?"
            for *fields, attempt_id in self._database.read(sql, (rollout_id,)):
                if fields[7] in ("succeeded", "failed"):
                    records.append(RolloutRecord(*fields, calls=read_calls(self._database, attempt_id)))
        return records

    def rollout_events(self, rollout_id: int) -> list[dict]:
        """See `Store.rollout_events`."""
        self._database.flush()
        sql = "SELECT events FROM attempts WHERE rollout_id = ? ORDER BY number DESC LIMIT 1"
        rows = self._database.read(sql, (rollout_id,))
        return json.loads(rows[0][0]) if rows and rows[0][0] else []

    def cancel_open(self, job_id: str) -> int:
        """See `Store.cancel_open`."""
        with self._changed:
            rollouts = [rollout for rollout in self._open.values() if rollout.job_id == job_id]
            ended = [self._close(rollout, "cancelled", None) for rollout in rollouts]
            self._waiting.pop(job_id, None)
            self._changed.notify_all()
        self._after_end(ended)
        return len(rollouts)

    def discard_after(self, job_id: str, step: int, tested: bool) -> None:
        """See `Store.discard_after`."""
        self.cancel_open(job_id)
        later = "job_id = ? AND (step > ? OR step > ? AND mode = 'evaluate')"
        rollouts = f"SELECT rollout_id FROM rollouts WHERE {later}"
        attempts = f"SELECT attempt_id FROM attempts WHERE rollout_id IN ({rollouts})"
        rows = [(job_id, step, step if tested else step - 1)]
        self._database.write(
            (f"DELETE FROM calls WHERE attempt_id IN ({attempts})", rows),
            (f"DELETE FROM attempts WHERE rollout_id IN ({rollouts})", rows),
            (f"DELETE FROM rollouts WHERE {later}", rows),
        )
        self._jobs.discard_events(job_id, step)

    def expect_pool(self, job_id: str) -> None:
        """See `Store.expect_pool`."""
        with self._changed:
            self._heard.setdefault(job_id, time.monotonic())

    def silent_s(self, job_id: str) -> float:
        """See `Store.silent_s`."""
        now = time.monotonic()
        with self._changed:
            self._tick(now)
            return now - self._heard.get(job_id, now)

    # ---- the worker pool's side ----

    def report(self, job_id: str, pool_id: str, results: Sequence[dict], running: Sequence[str]) -> None:
        """Takes in a pool's results and what it still runs. Results of leases that have ended are ignored."""
        ended = []
        now = time.monotonic()
        with self._changed:
            self._pools[pool_id] = self._heard[job_id] = now
            for result in results:
                lease = self._leases.get(result["lease_id"])
                if lease is not None and lease.job_id == job_id:
                    ended.append(self._take_result(lease, result))
            held = set(running)
            for lease in list(self._leases.values()):
                if lease.pool_id != pool_id:
                    continue
                if lease.lease_id in held:
                    lease.arrived = True
                elif now - lease.granted > GRANT_GRACE_S:
                    if not lease.arrived:
                        rollout = self._open[lease.rollout_id]
                        rollout.lost_replies = min(rollout.lost_replies + 1, MAX_LOST_REPLIES)
                    ended.append(self._give_up(lease, "lost", "the worker pool no longer runs it"))
            if ended:
                self._changed.notify_all()
        self._after_end(ended)

    def grant(self, job_id: str, pool_id: str, running: Sequence[str], want: int) -> dict:
        """The reply to an exchange as things stand: up to `want` new leases, and which of `running` have ended."""
        with self._changed:
            status = self._jobs.status(job_id)
            self._pools[pool_id] = self._heard[job_id] = time.monotonic()
            waiting = self._waiting[job_id] if job_id in self._waiting else ()
            attempts = []
            while len(attempts) < want and waiting:
                rollout = waiting.popleft()
                if rollout.rollout_id in self._open:
                    attempts.append(self._lease(rollout, pool_id))
            cancelled = [lease_id for lease_id in running if lease_id not in self._leases]
        return {"job_status": status, "leases": [_lease_message(a) for a in attempts], "cancelled": cancelled}

    def exchange(self, job_id, pool_id, results, running, want, wait_s) -> dict:
        """See `Store.exchange`."""
        self.report(job_id, pool_id, results, running)
        deadline = time.monotonic() + min(wait_s, POOL_SILENCE_S - 5.0)
        with self._changed:
            while True:
                reply = self.grant(job_id, pool_id, running, want)
                left = deadline - time.monotonic()
                if results or not want or not is_idle(reply) or self._jobs.ended(job_id) or left <= 0:
                    return reply
                self._changed.wait(left)

    def reclaim(self) -> None:
        """Gives up the leases of silent pools and those far past their time-out."""
        ended = []
        now = time.monotonic()
        with self._changed:
            self._tick(now)
            for lease in list(self._leases.values()):
                if now - self._pools[lease.pool_id] > POOL_SILENCE_S:
                    ended.append(self._give_up(lease, "lost", f"its worker pool was silent for {POOL_SILENCE_S:.0f} s"))
                elif now > lease.deadline:
                    ended.append(self._give_up(lease, "timeout", "the rollout ran past its time-out"))
            if ended:
                self._changed.notify_all()
        self._after_end(ended)

    def _tick(self, now: float) -> None:
        """Takes the time during which this process stood still out of every pool's silence; called in `wait`."""
        late, self._ticked = now - self._ticked - _TICK_S, now
        if late > _STALL_S:
            for times in (self._pools, self._heard):
                times.update({name: min(now, seen + late) for name, seen in times.items()})

    # ---- model_api's side ----

    def attempt_by_token(self, token: str) -> Attempt | None:
        """See `Store.attempt_by_token`."""
        return self._tokens.get(token)

    def record_call(self, attempt: Attempt, call: CallRecord) -> bool:
        """See `Store.record_call`."""
        if attempt.ended:
            return False
        attempt.calls.append(call)
        kept = ("constrained", "model", "role", "messages", "tools", "reply", "request")
        content = {name: getattr(call, name) for name in kept}
        if call.last_policy_version is not None:
            content["last_policy_version"] = call.last_policy_version
        row = (
            attempt.attempt_id,
            call.index,
            call.parent,
            time.time(),
            np.asarray(call.prompt_ids, np.int32).tobytes(),
            np.asarray(call.sampled_ids, np.int32).tobytes(),
            np.asarray(call.logprobs, np.float32).tobytes(),
            call.temperature,
            call.top_p,
            call.top_k,
            call.policy_version,
            call.finish_reason,
            call.reward,
            _json(content),
        )
        self._database.write((f"INSERT INTO calls VALUES ({', '.join('?' * 14)})", [row]))
        return True

    # ---- with the lock held ----

    def _lease(self, rollout: _Rollout, pool_id: str) -> Attempt:
        rollout.attempts += 1
        now = time.monotonic()
        attempt = Attempt(
            attempt_id=next(self._attempt_ids),
            rollout_id=rollout.rollout_id,
            job_id=rollout.job_id,
            number=rollout.attempts,
            pool_id=pool_id,
            lease_id=secrets.token_hex(8),
            token=secrets.token_urlsafe(24),
            mode=rollout.mode,
            step=rollout.step,
            seed=rollout.seed,
            entry=rollout.entry,
            metadata=rollout.metadata,
            timeout_s=rollout.timeout_s,
            granted=now,
            deadline=now + rollout.timeout_s + TIMEOUT_GRACE_S,
        )
        rollout.lease = self._leases[attempt.lease_id] = self._tokens[attempt.token] = attempt
        sql = "INSERT INTO attempts (attempt_id, rollout_id, number, pool_id, created) VALUES (?, ?, ?, ?, ?)"
        self._database.write((sql, [(attempt.attempt_id, rollout.rollout_id, attempt.number, pool_id, time.time())]))
        return attempt

    def _take_result(self, lease: Attempt, result: dict) -> Attempt:
        reward, error, cause = result.get("reward"), result.get("error") or {}, result.get("cause")
        text = f"{error['type']}: {error['message']}" if error else None
        if cause is None and error:
            cause = "exception"
        if cause is None and not _is_reward(reward):
            cause, text = "invalid_reward", f"the agent returned {reward!r}, not a finite number (float32)"
        if cause in RETRIED_CAUSES:
            return self._give_up(lease, cause, text, error.get("traceback"), result)
        for settle in lease.on_result:
            settle()
        status = "succeeded" if cause is None else "failed"
        reward = float(reward) if cause is None else None
        fields = {"reward": reward, "error": text, "traceback": error.get("traceback")}
        return self._close(self._open[lease.rollout_id], status, cause, result=result, **fields)

    def _give_up(self, lease: Attempt, cause: str, text: str | None, traceback=None, result=None) -> Attempt:
        rollout = self._open[lease.rollout_id]
        if rollout.attempts - rollout.lost_replies >= rollout.max_attempts:
            return self._close(rollout, "failed", cause, error=text, traceback=traceback, result=result)
        self._end_lease(rollout, cause, result)
        self._waiting[rollout.job_id].appendleft(rollout)
        return lease

    def _close(self, rollout, status, cause, *, reward=None, error=None, traceback=None, result=None) -> Attempt | None:
        lease = rollout.lease
        self._end_lease(rollout, cause, result)
        del self._open[rollout.rollout_id]
        for left in self._awaited:
            left.discard(rollout.rollout_id)
        sql = (
            "UPDATE rollouts SET status = ?, cause = ?, reward = ?, error = ?, traceback = ?, attempt = ?, "
            "attempt_id = ?, duration_s = ? WHERE rollout_id = ?"
        )
        duration_s = (result or {}).get("duration_s") or 0.0
        attempt_id = lease.attempt_id if lease else None
        row = (status, cause, reward, error, traceback, rollout.attempts, attempt_id, duration_s, rollout.rollout_id)
        self._database.write((sql, [row]))
        return lease

    def _end_lease(self, rollout: _Rollout, cause: str | None, result: dict | None) -> None:
        lease, rollout.lease = rollout.lease, None
        if lease is None:
            return
        lease.ended = True
        del self._leases[lease.lease_id], self._tokens[lease.token]
        events = (result or {}).get("events")
        if cause or events:
            sql = "UPDATE attempts SET cause = ?, events = ? WHERE attempt_id = ?"
            self._database.write((sql, [(cause, _json(events) if events else None, lease.attempt_id)]))
        if rewards := [(e["reward"], lease.attempt_id, e["call_index"]) for e in events or () if _is_reward_event(e)]:
            sql = "UPDATE calls SET reward = reward + ? WHERE attempt_id = ? AND call_index = ?"
            self._database.write((sql, rewards))

    def _after_end(self, attempts: Sequence[Attempt | None]) -> None:
        """Stops the model calls of ended attempts and tells whoever listens; without the lock."""
        for attempt in attempts:
            for cancel in list(attempt.on_end.values()) if attempt else ():
                cancel()
        if attempts:
            self._announce()


def is_idle(reply: dict) -> bool:
    """Whether an exchange's reply tells its pool nothing new."""
    return not reply["leases"] and not reply["cancelled"]


def read_calls(database: Database, attempt_id: int | None) -> list[CallRecord]:
    """The calls of an attempt in order of arrival, `parent` as a position in the list."""
    sql = (
        "SELECT call_index, parent, prompt_ids, sampled_ids, logprobs, temperature, top_p, top_k, policy_version, "
        "finish_reason, reward, content FROM calls WHERE attempt_id = ? ORDER BY call_index"
    )
    rows = database.read(sql, (attempt_id,))
    position = {row[0]: i for i, row in enumerate(rows)}
    calls = []
    for index, parent, prompt, sampled, logprobs, temperature, top_p, top_k, version, reason, reward, content in rows:
        calls.append(
            CallRecord(
                prompt_ids=np.frombuffer(prompt, np.int32),
                sampled_ids=np.frombuffer(sampled, np.int32),
                logprobs=np.frombuffer(logprobs, np.float32),
                parent=position.get(parent),
                temperature=temperature,
                policy_version=version,
                finish_reason=reason,
                reward=reward,
                top_p=top_p,
                top_k=top_k,
                index=index,
                **json.loads(content),
            )
        )
    return calls


def _lease_message(attempt: Attempt) -> dict:
    return {
        "lease_id": attempt.lease_id,
        "rollout_id": attempt.rollout_id,
        "attempt": attempt.number,
        "token": attempt.token,
        "task_id": attempt.entry.task_id,
        "task": attempt.entry.task,
        "metadata": attempt.metadata
        | {"mode": attempt.mode, "rollout_id": attempt.rollout_id, "attempt": attempt.number, "step": attempt.step},
        "timeout_s": attempt.timeout_s,
    }


def _is_reward(value) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= _LARGEST_REWARD


def _is_reward_event(event: dict) -> bool:
    index = event.get("call_index")
    is_index = type(index) is int and 0 <= index < 2**63  # as many as SQLite knows
    return event.get("kind") == "reward" and is_index and _is_reward(event.get("reward"))


def _json(value) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer beyond 64 bits, half of a surrogate pair
        return json.dumps(value).encode()
