"""The client: uploads data, starts jobs and runs their agents here, on this machine."""

import hashlib
import math
import os
import signal
import threading
import uuid
from collections.abc import Callable
from contextlib import contextmanager

from agent_lightning import dataset, exceptions, settings
from agent_lightning.agent_source import pack_agent
from agent_lightning.exceptions import (
    AgentLightningError,
    DataUploadError,
    InvalidConfigError,
    ServerConnectionError,
    TrainingError,
)
from agent_lightning.pool import Pool
from agent_lightning.progress import JobProgress
from agent_lightning.transport import Transport
from agent_lightning.types import EvalResult, TrainingResult

WORKERS_PER_CORE = 4  # agents mostly wait for the model
MOST_WORKERS = 64
EVENTS_WAIT_S = 10.0


class Client:
    """A Lightning server, as a user sees it.

    Args:
        server_url: base URL; by default AGENT_LIGHTNING_SERVER_URL.
        timeout: seconds that one HTTP request may take.
        max_retries: how often one HTTP request is tried again; by default LIGHTNING_MAX_RETRIES, or 3.
        verify_ssl: whether the server's certificate is checked.
        api_key: by default AGENT_LIGHTNING_API_KEY.

    Raises:
        InvalidConfigError: no URL, or a bad setting. Nothing is sent before a method is called.
    """

    def __init__(
        self,
        server_url: str | None = None,
        timeout: float = 300,
        max_retries: int | None = None,
        verify_ssl: bool = True,
        *,
        api_key: str | None = None,
    ):
        self.server_url = settings.server_url(server_url)
        self._connection = {
            "api_key": settings.api_key(api_key),
            "timeout_s": timeout,
            "max_retries": settings.max_retries(max_retries),
            "verify_ssl": verify_ssl,
        }
        self._transport = Transport(self.server_url, **self._connection)
        self._data_id: str | None = None

    def upload_data(self, train_file: str, test_file: str | None = None, data_id: str | None = None) -> str:
        """Uploads JSONL files, one task a line. All lines are checked before anything is sent.

        Args:
            train_file: the tasks to train on.
            test_file: held-out tasks, for evaluation.
            data_id: the dataset's name; an existing one is replaced. By default derived from the contents.

        Returns:
            The dataset's id, which `train` uses unless it is told another.

        Raises:
            DataUploadError: a file cannot be read, or a line is not an object with a `question`; names the line.
            ServerConnectionError: the server cannot be reached.
        """
        files = {"train": train_file} | ({"test": test_file} if test_file else {})
        self._data_id = self._upload(files, data_id)
        return self._data_id

    def train(
        self,
        agent_func: Callable | str,
        nworkers: int = -1,
        epochs: int = 1,
        batch_size: int = 32,
        data_id: str | None = None,
        *,
        eval_interval: int = 50,
        metadata: dict | None = None,
        rollout_timeout: float | None = None,
        max_attempts: int | None = None,
    ) -> TrainingResult:
        """Trains the server's model with an agent that runs in worker processes here.

        Ctrl-C once ends the job after the step in hand, with a checkpoint; twice ends it at once.

        Args:
            agent_func: `(resource, task) -> reward`, also async, or a script as `file.py` or `file.py:function`.
            nworkers: worker processes, each running one rollout at a time; -1 chooses from the number of cores.
            epochs: passes over the training tasks.
            batch_size: tasks per update.
            data_id: an uploaded dataset; by default this client's last upload.
            eval_interval: updates between evaluations on the test tasks.
            metadata: given to the agent as `resource.metadata`.
            rollout_timeout: seconds that one call of the agent may take; by default the server's setting.
            max_attempts: how often a rollout is run whose worker crashes or overstays its time; likewise.

        Raises:
            TrainingError: the job failed, or the agent cannot be loaded.
            InvalidConfigError: a bad argument.
            ServerConnectionError: the server cannot be reached.
        """
        _at_least_one(epochs=epochs, batch_size=batch_size, eval_interval=eval_interval)
        spec = {
            "kind": "train",
            "data_id": self._dataset(data_id),
            "epochs": epochs,
            "batch_size": batch_size,
            "eval_interval": eval_interval,
            "metadata": metadata,
            "rollout_timeout": rollout_timeout,
            "max_attempts": max_attempts,
        }
        job = self._run_job("training", spec, agent_func, choose_nworkers(nworkers))
        return _training_result(job)

    def evaluate(
        self,
        agent_func: Callable | str,
        test_file: str | None = None,
        *,
        nworkers: int = 4,
        data_id: str | None = None,
        metadata: dict | None = None,
        rollout_timeout: float | None = None,
    ) -> EvalResult:
        """Runs an agent once on every test task with the server's current weights, which stay as they are.

        Args:
            agent_func: as for `train`.
            test_file: tasks to upload for this; by default the test tasks of `data_id` or of this client's last upload.
            nworkers, data_id, metadata, rollout_timeout: as for `train`.

        Raises:
            TrainingError: more than half of the rollouts failed, or the agent cannot be loaded.
            DataUploadError, InvalidConfigError, ServerConnectionError: as `upload_data` and `train`.
        """
        spec = {
            "kind": "evaluate",
            "data_id": self._upload({"test": test_file}, None) if test_file else self._dataset(data_id),
            "metadata": metadata,
            "rollout_timeout": rollout_timeout,
        }
        job = self._run_job("evaluation", spec, agent_func, choose_nworkers(nworkers))
        result = job["result"]
        return EvalResult(
            mean=_float(result["reward"]),
            standard_error=_float(result["standard_error"]),
            rewards=result["rewards"],
            failures=result["failed"],
            step=result["step"],
            total_time=result["total_time"],
            job_id=job["job_id"],
        )

    def close(self) -> None:
        """Closes the connections to the server."""
        self._transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _upload(self, files: dict[str, str | os.PathLike], data_id: str | None) -> str:
        digest = hashlib.sha256()
        for split, path in files.items():
            digest.update(split.encode())
            dataset.check_file(path, digest)
        data_id = data_id or f"data-{digest.hexdigest()[:16]}"
        for split, path in files.items():
            try:
                self._transport.request(
                    "PUT", f"/api/datasets/{data_id}/{split}", content=lambda path=path: dataset.read_chunks(path)
                )
            except OSError as error:
                raise DataUploadError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error
        return data_id

    def _dataset(self, data_id: str | None) -> str:
        chosen = data_id or self._data_id
        if not chosen:
            raise InvalidConfigError("no dataset", hint="call upload_data first, or pass data_id=")
        return chosen

    def _run_job(self, title: str, spec: dict, agent: Callable | str, nworkers: int) -> dict:
        """Starts a job, runs its agents and shows its progress until it has ended; returns the job."""
        source = pack_agent(agent)  # before the job exists, since it may not be possible
        spec = {name: value for name, value in spec.items() if value is not None} | {"key": uuid.uuid4().hex}
        job_id = self._transport.request("POST", "/api/jobs", json=spec)["job_id"]
        ended = threading.Event()
        with JobProgress(title) as progress:
            pool = Pool(self.server_url, job_id, source, nworkers, on_output=progress.on_output, **self._connection)
            follower = threading.Thread(target=self._follow, args=(job_id, progress, ended), daemon=True)
            follower.start()
            try:
                with self._interruptible(job_id, progress):
                    pool.run(progress.on_status)
            except BaseException:
                self._stop_job(job_id, now=True)
                raise
            finally:
                ended.set()
            follower.join(EVENTS_WAIT_S)
        job = self._transport.request("GET", f"/api/jobs/{job_id}")
        if job["status"] == "failed":
            raise job_error(job)
        if not job.get("result"):
            raise TrainingError(f"job {job_id} was stopped before it had a result")
        return job

    def _follow(self, job_id: str, progress: JobProgress, ended: threading.Event) -> None:
        """Shows the job's events until it has ended and all of them have been shown."""
        after = 0
        while True:
            last_round = ended.is_set()
            params = {"after": after, "wait_s": 0.0 if last_round else EVENTS_WAIT_S}
            try:
                events = self._transport.request("GET", f"/api/jobs/{job_id}/events", params=params)["events"]
                job = self._transport.request("GET", f"/api/jobs/{job_id}") if events else {}
            except ServerConnectionError:  # the pool decides when that has lasted too long
                if ended.wait(1.0):
                    return
                continue
            except AgentLightningError:
                return
            for event in events:
                progress.on_event(event, job)
                after = event["seq"]
            if not events and (last_round or ended.wait(0.05)):
                return

    @contextmanager
    def _interruptible(self, job_id: str, progress: JobProgress):
        """Ctrl-C once asks the job to end after its step, twice raises KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        asked = False

        def ask():
            progress.say("stopping after this step; press Ctrl-C again to stop at once")
            self._stop_job(job_id, now=False)

        def on_interrupt(*_):
            nonlocal asked
            if asked:
                raise KeyboardInterrupt
            asked = True
            threading.Thread(target=ask, daemon=True).start()  # the handler itself must not wait for locks

        previous = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _stop_job(self, job_id: str, *, now: bool) -> None:
        try:
            self._transport.request("POST", f"/api/jobs/{job_id}/stop", json={"now": now})
        except AgentLightningError:  # it is over, or out of reach: the caller's own error matters more
            pass


def choose_nworkers(nworkers: int, most: int | None = None) -> int:
    """The number of workers: as asked, or for -1 a few for each core.

    Args:
        nworkers: as asked; -1 leaves the choice to this function.
        most: the number of rollouts that a step can use at once, at least 1; it bounds the choice, not what was asked.

    Raises:
        InvalidConfigError: 0, or less than -1.
    """
    if nworkers == -1:
        return min(MOST_WORKERS, WORKERS_PER_CORE * (os.cpu_count() or 1), MOST_WORKERS if most is None else most)
    if nworkers < 1:
        raise InvalidConfigError(f"nworkers={nworkers} is not a number of processes", hint="-1 chooses one")
    return nworkers


def _at_least_one(**arguments: int) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int) or value < 1:
            raise InvalidConfigError(f"{name}={value!r} is not a whole number from 1 on")


def job_error(job: dict) -> TrainingError:
    """Why a job failed, as the exception to raise.

    Args:
        job: a failed job; of it, `error` is "Type: message" and `traceback` the server's.

    Returns:
        For an error of this project, which explains itself, with its message alone, since a printed exception is
        headed by its type; for any other with the type and the traceback too.
    """
    unknown = "the server does not say why"
    error = job.get("error") or unknown
    kind, colon, message = error.partition(": ")
    known = getattr(exceptions, kind, None)
    if colon and isinstance(known, type) and issubclass(known, AgentLightningError):
        return TrainingError(message or unknown)
    return TrainingError("\n".join(filter(None, [error, job.get("traceback")])))


def _training_result(job: dict) -> TrainingResult:
    result = job["result"]
    return TrainingResult(
        final_reward=_float(result["final_reward"]),
        train_rewards=[_float(reward) for reward in result["train_rewards"]],
        test_rewards=[_float(reward) for reward in result["test_rewards"]],
        checkpoints=list(result["checkpoints"]),
        total_steps=result["total_steps"],
        total_time=result["total_time"],
        job_id=job["job_id"],
    )


def _float(value: float | None) -> float:
    """JSON has no NaN: it arrives as null."""
    return math.nan if value is None else float(value)
