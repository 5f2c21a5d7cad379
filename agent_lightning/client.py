"""The client: uploads data, starts jobs and runs their agents here, on this machine."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from agent_lightning import dataset, settings
from agent_lightning.agent_source import pack_agent, refuse_jobs_while_unpacking
from agent_lightning.checkpoint_copies import CheckpointCopies
from agent_lightning.download import download_model, shown_progress
from agent_lightning.exceptions import InvalidConfigError
from agent_lightning.jobs import Job
from agent_lightning.pool import Pool
from agent_lightning.results import eval_result, training_result
from agent_lightning.transport import Transport
from agent_lightning.types import EvalResult, TrainingResult, Trajectory

WORKERS_PER_CORE = 4  # agents mostly wait for the model
MOST_WORKERS = 64


class Client:
    """A Lightning server, as a user sees it.

    Args:
        server_url: base URL; by default AGENT_LIGHTNING_SERVER_URL.
        timeout: seconds that one HTTP request may go without an answer; a training run takes many.
        max_retries: how often one HTTP request is tried again; by default LIGHTNING_MAX_RETRIES, or 3.
        verify_ssl: whether the server's certificate is checked.
        api_key: by default AGENT_LIGHTNING_API_KEY.
        ray_address: workers run on the nodes of this Ray cluster instead of this machine; "auto" is the cluster that
            this machine belongs to. The server's URL must lead to it from every node. A script, and modules that can be
            imported here, must lie at the same path on each; other functions travel by themselves. Needs the extra
            `ray`.

    Raises:
        InvalidConfigError: no URL, or a bad setting. Nothing is sent before a method is called.
    """

    def __init__(
        self,
        server_url: str | None = None,
        timeout: float = 300,
        max_retries: int | None = None,
        verify_ssl: bool = True,
        api_key: str | None = None,
        ray_address: str | None = None,
    ):
        self.server_url = settings.server_url(server_url)
        self._connection = {
            "api_key": settings.api_key(api_key),
            "timeout_s": settings.timeout_s(timeout),
            "max_retries": settings.max_retries(max_retries),
            "verify_ssl": settings.verify_ssl(verify_ssl),
        }
        self._transport = Transport(self.server_url, **self._connection)
        self._data_id: str | None = None
        self._ray_address = ray_address

    def upload_data(self, train_file: str, test_file: str | None = None, data_id: str | None = None) -> str:
        """Uploads JSONL files, one task a line, of any size: neither side holds them in memory.

        All lines are checked before anything is sent. On the server both files become the dataset at one moment, or
        neither does; a job that has begun keeps the tasks it began with.

        Args:
            train_file: the tasks to train on.
            test_file: held-out tasks, for evaluation. Those that are training tasks too (the same `question` about
                the same `context`) are reported as a UserWarning.
            data_id: the dataset's name; an existing one is replaced as a whole. By default derived from the contents.

        Returns:
            The dataset's id, which `train` uses unless it is told another.

        Raises:
            InvalidConfigError: an argument is no path.
            DataUploadError: a file cannot be read, a line is not an object with a `question`, which is named, or the
                server could not store it.
            ServerConnectionError: the server cannot be reached.
        """
        self._data_id = self._upload({"train": train_file} | ({"test": test_file} if test_file else {}), data_id)
        return self._data_id

    def train(
        self,
        agent_func: Callable | str,
        nworkers: int = -1,
        epochs: int = 1,
        batch_size: int = 32,
        data_id: str | None = None,
        checkpoint_dir: str | None = None,
        eval_interval: int = 50,
        *,
        test_file: str | None = None,
        metadata: dict | None = None,
        rollout_timeout: float | None = None,
        max_attempts: int | None = None,
    ) -> TrainingResult:
        """Trains the server's model with an agent that runs in worker processes here.

        The training is a job of the server, which survives a restart of the server. Ctrl-C once ends it after the
        step in hand, with a checkpoint and a last evaluation; twice, or SIGTERM, ends it at once.

        Args:
            agent_func: `(resource, task) -> reward`, also async, or a script as `file.py` or `file.py:function`.
            nworkers: worker processes, each running one rollout at a time; -1 chooses from the number of cores, the
                server's slots and the rollouts of a batch.
            epochs: passes over the training tasks; a server with `runtime.total_steps` makes so many updates instead.
            batch_size: tasks per update; the server runs `algorithm.group_size` rollouts of each.
            data_id: an uploaded dataset; by default this client's last upload.
            checkpoint_dir: a folder on this machine; every checkpoint that the server saves is also downloaded to it
                as it comes, as a Hugging Face model folder `step-N`, with a link `latest`. Of several models each is
                a folder in `step-N`.
            eval_interval: updates between evaluations on the test tasks; there is always one before the first update
                and one after the last.
            test_file: test tasks to upload for this, instead of those of the dataset.
            metadata: given to the agent in `resource.metadata`.
            rollout_timeout: seconds that one call of the agent may take; by default the server's setting.
            max_attempts: how often a rollout is run whose worker crashes or overstays its time; likewise.

        Raises:
            TrainingError: the job failed, or the agent cannot be loaded.
            InvalidConfigError: a bad argument.
            DataUploadError: `test_file`, as for `upload_data`.
            ServerConnectionError: the server cannot be reached, or stayed away for five minutes.
        """
        settings.check_whole(1, epochs=epochs, batch_size=batch_size, eval_interval=eval_interval)
        if max_attempts is not None:
            settings.check_whole(1, max_attempts=max_attempts)
        if rollout_timeout is not None:
            settings.check_seconds(rollout_timeout=rollout_timeout)
        choose_nworkers(nworkers)
        spec = {
            "kind": "train",
            "data_id": self._dataset(data_id),
            "test_data_id": self._upload({"test": test_file}) if test_file else None,
            "epochs": epochs,
            "batch_size": batch_size,
            "eval_interval": eval_interval,
            "metadata": metadata,
            "rollout_timeout": rollout_timeout,
            "max_attempts": max_attempts,
        }
        if checkpoint_dir:
            _a_path(checkpoint_dir=checkpoint_dir)
        copies = CheckpointCopies(checkpoint_dir, self._download_all) if checkpoint_dir else None
        try:
            return training_result(self._run_job("training", spec, agent_func, nworkers, copies))
        finally:
            if copies is not None:
                copies.close()

    def evaluate(
        self,
        agent_func: Callable | str,
        test_file: str | None = None,
        checkpoint: str | None = None,
        nworkers: int = 4,
        *,
        num_samples: int | None = None,
        success_threshold: float = 1.0,
        data_id: str | None = None,
        metadata: dict | None = None,
        rollout_timeout: float | None = None,
    ) -> EvalResult:
        """Runs an agent on every test task. The weights that are being trained stay as they are.

        The agent's own sampling parameters hold. Where it gives no temperature it is 0, or 1 with `num_samples`.

        Args:
            agent_func: as for `train`.
            test_file: tasks to upload for this; by default the test tasks of `data_id` or of this client's last upload.
            checkpoint: `latest`, `best`, `step-N`, or a path of `TrainingResult.checkpoints`; by default the current
                weights. While a checkpoint is evaluated the whole server samples from it.
            num_samples: rollouts of each task, by default one; the result then has their rewards and pass@k too.
            success_threshold: the least reward that counts as a success in pass@k.
            nworkers, data_id, metadata, rollout_timeout: as for `train`.

        Raises:
            TrainingError: more than half of the rollouts failed, or the agent cannot be loaded.
            InvalidConfigError: a bad argument, or no such checkpoint; says which there are.
            DataUploadError, ServerConnectionError: as for `upload_data` and `train`.
        """
        choose_nworkers(nworkers)
        if num_samples is not None:
            settings.check_whole(1, num_samples=num_samples)
        if rollout_timeout is not None:
            settings.check_seconds(rollout_timeout=rollout_timeout)
        is_number = isinstance(success_threshold, int | float) and not isinstance(success_threshold, bool)
        if not is_number or math.isnan(success_threshold):
            raise InvalidConfigError(f"success_threshold={success_threshold!r} is not a number")
        if checkpoint is not None:
            _a_path(checkpoint=checkpoint)
        spec = {
            "kind": "evaluate",
            "data_id": self._upload({"test": test_file}) if test_file else self._dataset(data_id),
            "checkpoint": None if checkpoint is None else os.fspath(checkpoint),
            "num_samples": num_samples,
            "metadata": metadata,
            "rollout_timeout": rollout_timeout,
        }
        return eval_result(self._run_job("evaluation", spec, agent_func, nworkers), success_threshold)

    def download_model(
        self,
        output_dir: str | os.PathLike,
        checkpoint: str = "latest",
        format: str = "huggingface",
        *,
        model: str | None = None,
    ) -> Path:
        """Downloads a model's weights; a download that is interrupted goes on when it is asked for again.

        Everything arrives in a hidden folder beside `output_dir` (in it, if it is a mount point) and is checked by its
        SHA-256. A folder that did not exist appears complete, at once. In one that did, the model's files replace those
        of the same name and the weights of an earlier model; other files stay. A download that is killed leaves nothing
        that a program takes for a model.

        Args:
            output_dir: the folder to make.
            checkpoint: `latest`, `best`, `step-N`, a path of a result's `checkpoints`, or `initial`, the model as it
                was before training. Before the first checkpoint `latest` is `initial`.
            format: `huggingface` is a folder that transformers, vLLM and this server load: weights, configs, tokenizer
                and chat template. `safetensors` is the weights alone. Both are in the dtype that the server computes
                in. `onnx` is a float32 graph with a key/value cache, named as optimum names it, with the configs and
                the tokenizer; the server needs the extra `onnx` for it. Where adapters were trained (LoRA), these have
                them merged into the model, and `peft` is the adapters alone, which PEFT and vLLM load beside it.
            model: which one, where the server trains several: its name, or its number from 1 on; by default the first.

        Returns:
            The folder's absolute path.

        Raises:
            InvalidConfigError: there is no such model, checkpoint or format, or the folder cannot be written.
            ServerConnectionError: the server cannot be reached, or stopped answering for longer than the retries.
        """
        _a_path(output_dir=output_dir, checkpoint=checkpoint)
        with shown_progress(f"{checkpoint} as {format}") as progress:
            return self._download(output_dir, checkpoint, format, model, progress)

    def trajectories(
        self,
        job: str | TrainingResult | EvalResult,
        *,
        step: int | None = None,
        mode: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Trajectory]:
        """The rollouts of a job that have ended, with every model call in them; fetched a page at a time.

        Args:
            job: a job's id, or what `train` or `evaluate` returned.
            step: only those of this step: training rollouts of update N have step N, evaluations the number of updates
                before them.
            mode: only "train" or only "evaluate".
            limit: at most so many.

        Raises:
            InvalidConfigError: there is no such job or mode.
            ServerConnectionError: the server cannot be reached.
        """
        job_id = job if isinstance(job, str) else getattr(job, "job_id", None)
        if not job_id:
            raise InvalidConfigError(f"job={job!r} is neither a job's id nor a result of a job")
        wanted = {"step": step, "mode": mode}
        return self._trajectories(job_id, {name: value for name, value in wanted.items() if value is not None}, limit)

    def _trajectories(self, job_id: str, params: dict, left: int | None) -> Iterator[Trajectory]:
        after: int | None = 0
        while after is not None and left != 0:
            page = params | {"after": after} | ({"limit": left} if left else {})
            reply = self._transport.request("GET", f"/api/jobs/{job_id}/trajectories", params=page)
            for trajectory in reply["trajectories"]:
                yield Trajectory(**trajectory)
            left = None if left is None else left - len(reply["trajectories"])
            after = reply["next"]

    def close(self) -> None:
        """Closes the connections to the server."""
        self._transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _download(self, output_dir, checkpoint, format="huggingface", model=None, progress=None) -> Path:
        params = {"checkpoint": os.fspath(checkpoint), "format": format} | ({"model": model} if model else {})
        return download_model(self._transport, output_dir, params, progress or (lambda *_: None))

    def _download_all(self, output_dir: str, checkpoint: str) -> None:
        """A checkpoint of one model as a model folder, of several as a folder of such by name."""
        names = [model["id"] for model in self._transport.request("GET", "/v1/models")["data"]]
        if len(names) == 1:
            self._download(output_dir, checkpoint)
            return
        os.makedirs(output_dir, exist_ok=True)
        for name in names:
            self._download(os.path.join(output_dir, name), checkpoint, model=name)

    def _upload(self, files: dict[str, str | os.PathLike], data_id: str | None = None) -> str:
        files = {split: files[split] for split in dataset.SPLITS if split in files}
        _a_path(**{f"{split}_file": path for split, path in files.items()})
        if data_id is not None:
            dataset.check_name(data_id)
        checked = dataset.check_files(files)
        if checked.overlap:
            warnings.warn(checked.overlap, stacklevel=3)
        sizes = "-".join(f"{split}{size}" for split, size in checked.num_bytes.items())
        data_id = data_id or f"data-{hashlib.sha256(f'{sizes}-{checked.sha256}'.encode()).hexdigest()[:16]}"
        self._transport.request(
            "PUT",
            f"/api/datasets/{data_id}",
            params=checked.num_bytes | {"sha256": checked.sha256},
            content=lambda: dataset.read_chunks(files, checked.num_bytes),
        )
        return data_id

    def _dataset(self, data_id: str | None) -> str:
        chosen = data_id or self._data_id
        if not chosen:
            raise InvalidConfigError("no dataset", hint="call upload_data first, or pass data_id=")
        return chosen

    def _run_job(
        self, title: str, spec: dict, agent: Callable | str, nworkers: int, copies: CheckpointCopies | None = None
    ) -> dict:
        """Starts a job and runs its agents until it has ended; returns the job."""
        refuse_jobs_while_unpacking()
        for name, value in spec.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise InvalidConfigError(f"{name}={value!r} cannot be sent as JSON: {error}") from None
        source = pack_agent(agent)  # before there is a job, since it may not be possible
        job = Job(self._transport, title, spec)

        def make_pool(on_output) -> Pool:
            most, connection = job.rollouts_at_once, self._connection
            if self._ray_address is None:
                workers = choose_nworkers(nworkers, most=most)
                return Pool(self.server_url, job.job_id, source, workers, on_output=on_output, **connection)
            from agent_lightning import ray_pool

            if (workers := nworkers) == -1:
                workers = min(most, WORKERS_PER_CORE * ray_pool.cpus(self._ray_address))
            return ray_pool.RayPool(self._ray_address, self.server_url, job.job_id, source, workers, **connection)

        return job.run(make_pool, copies)


def choose_nworkers(nworkers: int, most: int | None = None) -> int:
    """The number of workers: as asked, or for -1 a few for each core, since agents mostly wait for the model.

    Args:
        nworkers: as asked; -1 leaves the choice to this function.
        most: the number of rollouts that a step can use at once, at least 1; it bounds the choice, not what was asked.

    Raises:
        InvalidConfigError: 0, or less than -1.
    """
    if nworkers == -1:
        return min(MOST_WORKERS, WORKERS_PER_CORE * (os.cpu_count() or 1), MOST_WORKERS if most is None else most)
    if isinstance(nworkers, bool) or not isinstance(nworkers, int) or nworkers < 1:
        raise InvalidConfigError(f"nworkers={nworkers} is not a number of processes", hint="-1 chooses one")
    return nworkers


def _a_path(**arguments: str | os.PathLike) -> None:
    for name, value in arguments.items():
        if not isinstance(value, str | os.PathLike) or not value:
            raise InvalidConfigError(f"{name}={value!r} is not a path")
