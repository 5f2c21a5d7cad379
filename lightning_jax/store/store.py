"""The store's one face: what the training loop, the server and model_api ask of it."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lightning_jax.store.database import Database
from lightning_jax.store.datasets import Datasets, Upload
from lightning_jax.store.jobs import Jobs
from lightning_jax.store.records import Attempt, CallRecord, DatasetInfo, RolloutEntry, RolloutRecord, StoreError
from lightning_jax.store.rollouts import Rollouts
from lightning_jax.store.trajectories import Filter, ended_rollouts


class Store:
    """SQLite record of datasets, jobs, rollouts, attempts and model calls.

    Every method may be called from any thread. Writes are committed in the order of the calls that made them, most of
    them a moment later; a process killed at any point leaves a store that opens and is a prefix of what happened.

    Raises:
        StoreError: the file cannot be opened, read or written. Once a write has failed, leases and results still change
            what is in memory, and whoever waits for rollouts or reads is told.
    """

    def __init__(self, path: str | Path):
        self._changed = threading.Condition(threading.RLock())
        self._listeners: list[Callable[[], None]] = []
        self._database = Database(path)
        self._datasets = Datasets(self._database)
        self._jobs = Jobs(self._database, self._changed, self._announce)
        self._rollouts = Rollouts(self._database, self._jobs, self._changed, self._announce)
        self._refusals: dict[str, str] = {}

    def close(self) -> None:
        """Commits what is queued and closes the file; another process may open it then."""
        self._database.close()

    def flush(self) -> None:
        """Returns when everything asked for so far is committed."""
        self._database.flush()

    @property
    def error(self) -> StoreError | None:
        """Why nothing is kept any more, None while all is well."""
        return self._database.error

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Has `listener` called, from whatever thread, whenever leases, jobs or events change. It must be quick."""
        self._listeners.append(listener)

    def remove_listener(self, listener: Callable[[], None]) -> None:
        """Ends what `add_listener` began."""
        self._listeners.remove(listener)

    def _announce(self) -> None:
        for listener in list(self._listeners):
            listener()

    # ---- datasets ----

    def put_dataset(self, data_id: str, split: str, chunks: Iterable[bytes]) -> DatasetInfo:
        """Stores a JSONL file, replacing at once the split of that name if there is one.

        Args:
            data_id, split: the dataset's name, and "train" or "test".
            chunks: the file's bytes in any pieces; memory stays bounded whatever their number.

        Raises:
            DataError: a line is not a JSON object or lacks `question`, or there is no task. Nothing is kept.
        """
        return self._datasets.put(data_id, split, chunks)

    def upload(self, data_id: str, split: str) -> Upload:
        """The same, pushed: an `Upload` with feed(bytes), finish() -> DatasetInfo and discard()."""
        return Upload(self._datasets, data_id, split)

    def replace_dataset(self, data_id: str, uploads: Sequence[Upload]) -> list[DatasetInfo]:
        """Finishes uploads together: at one moment they are the dataset, and what it was before is gone.

        Raises:
            DataError: one of them is not valid. The dataset is as it was; the caller must discard them all.
        """
        return self._datasets.replace(data_id, uploads)

    def hold_data(self, name: str, splits: Mapping[str, str]) -> None:
        """Keeps what datasets hold now under another name, also when they are replaced; copies nothing.

        Args:
            name: of the dataset that is made, or replaced; without any split it is no more.
            splits: for each split, the dataset to take it from.

        Raises:
            UnknownError: one of them has no such split.
        """
        self._datasets.hold(name, splits)

    def dataset(self, data_id: str) -> list[DatasetInfo]:
        """The dataset's splits; empty when there is no such dataset."""
        return self._datasets.info(data_id)

    def num_tasks(self, data_id: str, split: str) -> int:
        """How many tasks a split has. Raises UnknownError."""
        return self._datasets.num_tasks(data_id, split)

    def task(self, data_id: str, split: str, index: int) -> dict:
        """One task as uploaded. Raises UnknownError or IndexError."""
        return self._datasets.task(data_id, split, index)

    # ---- jobs ----

    def create_job(self, spec: dict, job_id: str | None = None) -> str:
        """Makes a job in state "queued" and returns its id.

        A job that already has this id, or the same `spec["key"]`, is returned instead: asking twice makes one job.
        """
        return self._jobs.create(spec, job_id)

    def job(self, job_id: str) -> dict:
        """The job as it is now: job_id, status, step, total_steps, error, traceback, result, spec, created.

        `status` is "queued", "running", "succeeded", "failed" or "stopped". Raises UnknownError.
        """
        return self._jobs.get(job_id)

    def job_status(self, job_id: str) -> str:
        """The job's `status` alone, which is always in memory. Raises UnknownError."""
        return self._jobs.status(job_id)

    def jobs(self) -> list[dict]:
        """Every job, oldest first, without its traceback and result."""
        return self._jobs.all()

    def update_job(self, job_id: str, **fields) -> None:
        """Sets any of status, step, total_steps, error, traceback, result and spec (JSON-ready dicts)."""
        self._jobs.update(job_id, **fields)

    def restart_job(self, job_id: str, spec: dict) -> None:
        """Queues a job again, under a new spec; its events and rollouts stay. Raises UnknownError."""
        self._jobs.restart(job_id, spec)

    def add_event(self, job_id: str, kind: str, step: int, data: dict) -> int:
        """Appends to the job's events and returns the event's sequence number, which only ever grows."""
        return self._jobs.add_event(job_id, kind, step, data)

    def events(self, job_id: str, after: int = 0, wait_s: float = 0.0) -> list[dict]:
        """Up to 1,000 events with `seq` above `after`: {"seq", "time", "kind", "step", "data"}, oldest first.

        Waits up to `wait_s` for one while the job goes on. Raises UnknownError.
        """
        return self._jobs.events(job_id, after, wait_s)

    def has_events(self, job_id: str, after: int) -> bool:
        """Whether `events` would return some without waiting. Raises UnknownError."""
        return self._jobs.has_events(job_id, after)

    def discard_after(self, job_id: str, step: int, *, tested: bool = True) -> None:
        """Forgets the job's rollouts and events of steps after `step`, and cancels what is open.

        Unless `step` is `tested`, the rollouts of its evaluation, which was broken off, are forgotten as well.
        """
        self._rollouts.discard_after(job_id, step, tested)

    # ---- rollouts ----

    def open_rollouts(
        self,
        job_id: str,
        *,
        step: int,
        mode: str,
        entries: Sequence[RolloutEntry],
        timeout_s: float,
        max_attempts: int = 3,
        metadata: dict | None = None,
        seed: int = 0,
    ) -> list[int]:
        """Offers rollouts to the job's worker pools, in this order.

        Args:
            mode: "train" or "evaluate".
            timeout_s: seconds a worker may take for one attempt.
            max_attempts: how often a rollout is tried when its worker crashes, times out or is lost.
            metadata: JSON-ready; becomes `resource.metadata`, with mode, rollout_id, attempt and step added.
            seed: part of every call's sampling noise.

        Returns:
            rollout ids in the order of `entries`.
        """
        return self._rollouts.open(
            job_id,
            step=step,
            mode=mode,
            entries=entries,
            timeout_s=timeout_s,
            max_attempts=max_attempts,
            metadata=metadata,
            seed=seed,
        )

    def wait(
        self,
        job_id: str,
        rollout_ids: Sequence[int],
        stop: Callable[[], bool] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Blocks until all these rollouts have ended or `stop()` is true, which is asked twice a second.

        Leases of silent pools are given up meanwhile. `progress(ended)` is called whenever more have ended.
        Raises StoreError once a write has failed, since nobody could read how the rollouts ended.
        """
        self._rollouts.wait(job_id, rollout_ids, stop, progress)

    def expect_pool(self, job_id: str) -> None:
        """Has the silence of a job's pools count from here on, also before it has rollouts."""
        self._rollouts.expect_pool(job_id)

    def silent_s(self, job_id: str) -> float:
        """Seconds since a pool last spoke for the job, queued or running, or was expected to if none has.

        It is from the first rollouts on, or from `expect_pool`; 0 before. To be asked in the `stop` of `wait`: a pause
        of several seconds between two questions counts as this process having stood still, when no pool could reach it.
        """
        return self._rollouts.silent_s(job_id)

    def finished(self, rollout_ids: Sequence[int]) -> list[RolloutRecord]:
        """Those of these rollouts that succeeded or failed, in the given order, each with its last attempt's calls."""
        return self._rollouts.finished(rollout_ids)

    def ended_rollouts(self, which: Filter, after: int = 0) -> Iterator[tuple[str, RolloutRecord]]:
        """(job id, rollout) of all that have ended, by rollout id, from `after` (not included) on; read bit by bit."""
        self._database.flush()
        return ended_rollouts(self._database, which, after)

    def rollout_events(self, rollout_id: int) -> list[dict]:
        """What the worker told beside the reward of the rollout's last attempt: AIR's rewards, and spans.

        {"kind": "reward", "call_index", "reward", "rule", "tool_name"}; {"kind": "span", "name", "span_kind",
        "trace_id", "span_id", "parent_id", "start_time" (of the worker's clock), "duration_s", "status", "attributes"}.
        """
        return self._rollouts.rollout_events(rollout_id)

    def cancel_open(self, job_id: str) -> int:
        """Takes back every rollout of the job that has not ended; their workers are told. Returns how many."""
        return self._rollouts.cancel_open(job_id)

    def exchange(
        self,
        job_id: str,
        pool_id: str,
        results: Sequence[dict],
        running: Sequence[str],
        want: int,
        wait_s: float = 0.0,
    ) -> dict:
        """One exchange with a worker pool, waiting up to `wait_s` for something to tell it.

        Args:
            results: {"lease_id", "reward", "error", "cause", "events", "duration_s"} of attempts that ended. Events are
                kept with the attempt; one like {"kind": "reward", "call_index": 0, "reward": 0.3} adds to the call's.
            running: lease ids the pool still works on; any other lease of it that is not fresh is given up.
            want: how many new leases it can take.

        Returns:
            {"job_status", "leases": [...], "cancelled": [lease ids to kill]}. Raises UnknownError.
        """
        return self._rollouts.exchange(job_id, pool_id, results, running, want, wait_s)

    def report(self, job_id: str, pool_id: str, results: Sequence[dict], running: Sequence[str]) -> None:
        """The first half of `exchange`, for callers that wait in their own way."""
        self._rollouts.report(job_id, pool_id, results, running)

    def grant(self, job_id: str, pool_id: str, running: Sequence[str], want: int) -> dict:
        """The second half of `exchange`; never waits."""
        return self._rollouts.grant(job_id, pool_id, running, want)

    def attempt_by_token(self, token: str) -> Attempt | None:
        """The attempt that holds this token, None once it has ended. A dictionary look-up."""
        return self._rollouts.attempt_by_token(token)

    def next_call_index(self, attempt: Attempt) -> int:
        """0, 1, 2 ... for the attempt's model calls, by arrival."""
        return next(attempt.arrivals)

    def record_call(self, attempt: Attempt, call: CallRecord) -> bool:
        """Adds a call to the attempt; False, and nothing kept, if the attempt has ended meanwhile."""
        return self._rollouts.record_call(attempt, call)

    def note_refusal(self, attempt: Attempt, text: str) -> None:
        """Remembers, until this process ends, why a model call of the attempt got no reply."""
        self._refusals.setdefault(attempt.job_id, text)

    def first_refusal(self, job_id: str) -> str | None:
        """What `note_refusal` was first told of a job; None where nothing was."""
        return self._refusals.get(job_id)
