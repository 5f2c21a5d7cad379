"""What `Client` and worker pools speak: jobs, events, and the exchange of leases for results."""

import asyncio
import collections
import contextlib
import logging
import threading
import traceback
from collections.abc import Callable
from typing import Any, Literal

import ml_collections
import pydantic
from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from agent_lightning.exceptions import AgentLightningError, InvalidConfigError
from lightning_jax import training
from lightning_jax.policies import Policies
from lightning_jax.server import wire
from lightning_jax.store import ENDED_JOB, DataError, Store, StoreError, UnknownError, is_idle

_log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 25.0  # under the time-outs of clients, and under the silence after which a pool counts as gone


class JobRunner:
    """Runs jobs one after the other in a thread of its own.

    Jobs that a killed server left unfinished come first, in the order in which they were made.

    Args:
        resume: says by its id whether an unfinished job of the store is to be gone on with; others stay as they are
            until they are submitted again.

    Attributes:
        policies, config: the server's models and settings.
        error: what ended the thread, if something did: no job can run any more.
    """

    def __init__(
        self,
        policies: Policies,
        store: Store,
        config: ml_collections.ConfigDict,
        *,
        resume: Callable[[str], bool] = lambda job_id: True,
    ):
        self.policies, self._store, self.config = policies, store, config
        self.error: BaseException | None = None
        self._changed = threading.Condition()
        unfinished = [job["job_id"] for job in store.jobs() if job["status"] not in ENDED_JOB]
        for job in store.jobs():
            if job["status"] in ENDED_JOB and store.dataset(_data_name(job["job_id"])):
                store.hold_data(_data_name(job["job_id"]), {})  # the server was killed when it had just ended
        self._queue = collections.deque(filter(resume, unfinished))
        self._stops: dict[str, training.StopFlag] = {job_id: training.StopFlag() for job_id in self._queue}
        for job_id, stop in self._stops.items():
            if wish := store.job(job_id)["spec"].get("stop"):
                stop.request(now=wish == "now")
            store.expect_pool(job_id)  # in the queue too
        self._running: str | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, spec: dict, job_id: str | None = None) -> str:
        """Queues a job and returns its id; a spec whose "key" is known returns the job made for it before.

        Args:
            job_id: its id; a job that has this id and has ended, or was left unfinished, is queued with this spec. It
                goes on from the policy's checkpoint, if that is this job's.

        Raises:
            StoreError: no job can run any more.
        """
        with self._changed:
            if self.error is not None:
                raise StoreError(f"no job can run any more: {self.error}", hint="start the server again")
            known = job_id is not None and any(job["job_id"] == job_id for job in self._store.jobs())
            if known and job_id not in self._queue and job_id != self._running:
                self._store.restart_job(job_id, spec)
            job_id = self._store.create_job(spec, job_id)
            if job_id not in self._stops and self._store.job_status(job_id) not in ENDED_JOB:
                self._hold_data(job_id)
                self._stops[job_id] = training.StopFlag()
                self._queue.append(job_id)
                self._changed.notify_all()
        return job_id

    def stop(self, job_id: str, now: bool = False, *, keep: bool = False) -> None:
        """Asks a job to end after its step, or at once; a job that has ended stays as it is.

        Args:
            keep: the next start is asked the same, if the server ends before the job does.
        """
        with self._changed:
            if job_id in self._stops:
                self._stops[job_id].request(now=now)
            if keep and job_id == self._running:
                spec = self._store.job(job_id)["spec"]
                wish = "now" if now or spec.get("stop") == "now" else "after_step"
                self._store.update_job(job_id, spec=spec | {"stop": wish})
            if job_id in self._queue:
                self._queue.remove(job_id)
                del self._stops[job_id]
                self._store.update_job(job_id, status="stopped")
                self._store.hold_data(_data_name(job_id), {})

    def close(self) -> None:
        """Stops the running job at once and ends the thread; the job stays unfinished, to be resumed."""
        with self._changed:
            self._closed = True
            for stop in self._stops.values():
                stop.request(now=True)
            self._changed.notify_all()
        self._thread.join()

    def _hold_data(self, job_id: str) -> None:
        """Lets a job keep the tasks it was made for, whatever is uploaded under their name before it ends.

        A job whose tasks cannot be held fails.
        """
        job = self._store.job(job_id)
        spec = job["spec"]
        if job["status"] == "queued" and "data_id" in spec:
            splits = {info.split: spec["data_id"] for info in self._store.dataset(spec["data_id"])}
            if "test_data_id" in spec:
                splits["test"] = spec["test_data_id"]
            try:
                self._store.hold_data(_data_name(job_id), splits)
            except AgentLightningError as error:  # the dataset is another by now, or the disk is full
                self._store.update_job(job_id, status="failed", error=f"{type(error).__name__}: {error}")
                raise

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue)
                if self._closed:
                    return
                self._running = job_id = self._queue.popleft()
            try:
                self._run(job_id)
            except BaseException as error:  # the store cannot be written: neither could what a next job does
                _log.exception("job %s could not be ended, and no other can run", job_id)
                self._end(error)
                return
            with self._changed:
                self._running = None
                del self._stops[job_id]

    def _end(self, error: BaseException) -> None:
        """Fails the jobs that were to run, so that nobody waits for them; what the file holds of them stays."""
        with self._changed:
            self.error = error
            for job_id in (self._running, *self._queue):
                with contextlib.suppress(StoreError):
                    self._store.update_job(job_id, status="failed", error=f"{type(error).__name__}: {error}")
            self._running = None
            self._queue.clear()

    def _run(self, job_id: str) -> None:
        stop = self._stops[job_id]
        self._store.update_job(job_id, status="running")
        spec = self._store.job(job_id)["spec"]
        held = _data_name(job_id)
        try:
            if stop.now:  # asked for before the server ended, and not to be begun again for it
                raise training.Stopped("stopped before it began")
            result = training.run_job(
                job_id=job_id,
                spec=spec | {"data_id": held} if self._store.dataset(held) else spec,
                policies=self.policies,
                store=self._store,
                config=self.config,
                stop=stop,
            )
        except training.Stopped:
            fields = {"status": "stopped"}
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, AgentLightningError):  # whoever asked for the job is told the rest
                _log.error("job %s failed: %s", job_id, text.partition("\n")[0])
            else:
                _log.exception("job %s failed", job_id)
            fields = {"status": "failed", "error": text, "traceback": traceback.format_exc()}
        else:
            fields = {"status": "stopped" if stop.after_step else "succeeded", "result": result}
        wish = self._store.job(job_id)["spec"].get("stop")
        if self._closed and fields["status"] == "stopped" and not (wish if "result" in fields else wish == "now"):
            return  # no client asked for this end: the next start goes on with it
        self._store.cancel_open(job_id)
        self._store.add_event(job_id, "ended", self._store.job(job_id)["step"], {"status": fields["status"]})
        self._store.update_job(job_id, **fields)
        self._store.hold_data(held, {})


def _data_name(job_id: str) -> str:
    """Under which a job's tasks are held; no upload can have this name."""
    return f"job:{job_id}"


class Pulse:
    """Wakes coroutines that wait for something in the store to change."""

    def __init__(self, store: Store):
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._waiting: set[asyncio.Future] = set()
        self._scheduled = False
        self.count = 0  # of changes; read it before looking, and give it to `wait`
        store.add_listener(self._changed)

    def close(self) -> None:
        self._store.remove_listener(self._changed)

    async def wait(self, count: int, timeout_s: float) -> None:
        """Returns at the first change after `count`, or when the time is over."""
        if self.count != count or timeout_s <= 0:
            return
        future = self._loop.create_future()
        self._waiting.add(future)
        try:
            await asyncio.wait([future], timeout=timeout_s)
        finally:
            self._waiting.discard(future)

    def _changed(self) -> None:
        self.count += 1
        if self._waiting and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._scheduled = False
        for future in self._waiting:
            if not future.done():
                future.set_result(None)


# ---- bodies ----


MAX_ROLLOUTS = 2**20  # of an evaluation: they are all opened at once


class JobBody(pydantic.BaseModel):
    """A job as `Client` asks for it; what is missing is the server's own setting."""

    model_config = pydantic.ConfigDict(extra="forbid")

    kind: Literal["train", "evaluate"] = "train"
    data_id: str
    test_data_id: str | None = None
    checkpoint: str | None = None
    num_samples: int | None = pydantic.Field(None, ge=1)
    epochs: int | None = pydantic.Field(None, ge=1, le=2**31)
    batch_size: int | None = pydantic.Field(None, ge=1)
    total_steps: int | None = pydantic.Field(None, ge=1, le=2**31)
    eval_interval: int | None = pydantic.Field(None, ge=0)
    metadata: dict[str, Any] | None = None
    rollout_timeout: float | None = pydantic.Field(None, gt=0)
    max_attempts: int | None = pydantic.Field(None, ge=1)
    key: str | None = None


class StopBody(pydantic.BaseModel):
    now: bool = False


class AgentError(pydantic.BaseModel):
    type: str
    message: str
    traceback: str | None = None


class AttemptResult(pydantic.BaseModel):
    lease_id: str
    reward: Any = None
    error: AgentError | None = None
    cause: Literal["crash", "timeout", "exception", "invalid_reward"] | None = None
    events: list[dict[str, Any]] = []
    duration_s: pydantic.FiniteFloat = 0.0


class ExchangeBody(pydantic.BaseModel):
    pool_id: str = pydantic.Field(min_length=1)
    results: list[AttemptResult] = []
    running: list[str] = []
    want: int = pydantic.Field(0, ge=0)
    wait_s: float = pydantic.Field(0.0, ge=0)


# ---- endpoints ----

router = APIRouter()


@router.post("/api/jobs")
async def create_job(request: Request, body: JobBody) -> Response:
    """Queues a job, and says how many of its rollouts can be under way at once. The same `key` gives the same job."""
    jobs: JobRunner | None = request.app.state.jobs
    store: Store = request.app.state.store
    if jobs is None:
        raise InvalidConfigError("this server runs one job of its own and takes no others", hint="start one to serve")
    evaluates = body.kind == "evaluate"
    needed = {"test" if evaluates else "train": body.data_id}
    if body.test_data_id:
        needed["test"] = body.test_data_id
    for split, data_id in needed.items():
        if split not in {info.split for info in store.dataset(data_id)}:
            hint = f"upload it, or upload it again with a {split} file"
            raise UnknownError(f"there is no dataset {data_id!r} with {split} tasks", hint=hint)
    if not evaluates and (body.checkpoint or body.num_samples):
        raise InvalidConfigError("checkpoint and num_samples are for evaluations")
    if body.checkpoint:
        jobs.policies.find_checkpoint(body.checkpoint)
    config = jobs.config
    if evaluates:
        rollouts = store.num_tasks(needed["test"], "test") * (body.num_samples or 1)
        if rollouts > MAX_ROLLOUTS:
            raise InvalidConfigError(f"that is {rollouts} rollouts; an evaluation may have {MAX_ROLLOUTS}")
    elif body.batch_size:
        rollouts = body.batch_size * config.algorithm.group_size
    else:
        rollouts = config.runtime.batch_size
    job_id = await run_in_threadpool(jobs.submit, body.model_dump(exclude_none=True))
    return wire.json_response({"job_id": job_id, "rollouts_at_once": min(rollouts, config.sampler.max_slots)})


@router.get("/api/jobs/{job_id}")
async def get_job(request: Request, job_id: str) -> Response:
    """The job as it is now."""
    return wire.json_response(await run_in_threadpool(request.app.state.store.job, job_id))


@router.get("/api/jobs/{job_id}/events")
async def get_events(
    request: Request, job_id: str, after: int = Query(0, ge=0, le=2**63 - 1), wait_s: float = 0.0
) -> Response:
    """Events after a sequence number, waiting for one; an empty list of an ended job means that there are no more."""
    store: Store = request.app.state.store
    ready = await _until(request, wait_s, lambda: store.has_events(job_id, after) or _ended(store, job_id))
    events = await run_in_threadpool(store.events, job_id, after) if ready else []
    return wire.json_response({"job_status": store.job_status(job_id), "events": events})


@router.post("/api/jobs/{job_id}/stop")
async def stop_job(request: Request, job_id: str, body: StopBody) -> Response:
    """Ends a job after its step, or now, also if the server is started again meanwhile."""
    store: Store = request.app.state.store
    store.job_status(job_id)
    if request.app.state.jobs is not None:
        await run_in_threadpool(request.app.state.jobs.stop, job_id, body.now, keep=True)
    return wire.json_response({"job_status": store.job_status(job_id)})


@router.post("/api/jobs/{job_id}/exchange")
async def exchange(request: Request, job_id: str, body: ExchangeBody) -> Response:
    """Takes a pool's results and gives it leases, waiting for some if it wants them and nothing else is to be said."""
    store: Store = request.app.state.store
    store.job_status(job_id)
    store.report(job_id, body.pool_id, [result.model_dump() for result in body.results], body.running)
    reply: dict = {}

    def told() -> bool:
        reply.update(store.grant(job_id, body.pool_id, body.running, body.want))
        return not is_idle(reply) or reply["job_status"] in ENDED_JOB

    await _until(request, body.wait_s if body.want and not body.results else 0.0, told)
    policies: Policies = request.app.state.policies
    for lease in reply["leases"]:
        lease["model_name"] = policies.first.name
        lease["model_names"] = list(policies)
        lease["metadata"]["policy_version"] = policies.first.version
    return wire.json_response(reply)


async def _until(request: Request, wait_s: float, condition: Callable[[], bool]) -> bool:
    """Waits up to `wait_s` for the condition, which is looked at after every change of the store; not for nobody."""
    pulse: Pulse = request.app.state.pulse
    loop = asyncio.get_running_loop()
    deadline = loop.time() + min(wait_s, _LONGEST_WAIT_S)
    while True:
        count = pulse.count
        if condition():
            return True
        left = deadline - loop.time()
        if left <= 0 or request.app.state.closing():
            return False
        await pulse.wait(count, min(left, 1.0))
        if await request.is_disconnected():  # whatever it were given would be lost
            return False


def _ended(store: Store, job_id: str) -> bool:
    return store.job_status(job_id) in ENDED_JOB


def error_response(error: AgentLightningError) -> Response:
    """An error as `Client` reads it: the name of its class, the text, and what else is known."""
    name = type(error).__name__
    content: dict = {"type": name, "message": _text(error), "hint": error.hint}
    status = 400
    if isinstance(error, DataError):
        content |= {"type": "DataUploadError", "line": error.line}
        status = 422
    elif isinstance(error, StoreError):
        status = 500
    elif isinstance(error, UnknownError):
        content["type"] = "InvalidConfigError"
        status = 404
    return wire.json_response({"error": content}, status)


def _text(error: AgentLightningError) -> str:
    """The message without the hint, which is sent beside it."""
    return str(error).removesuffix(f"\n  hint: {error.hint}") if error.hint else str(error)
