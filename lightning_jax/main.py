"""The program: `python -m lightning_jax.main --config=configs/quickstart.py --config.seed=1`.

`mode` "train" and "evaluate" start the server, put the config's tasks into its store, run the config's agent in worker
processes, and end with the job; "serve" waits for clients. The same command in the same work directory goes on where
the last one ended.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging

from agent_lightning import agent_source, cli, client, results
from agent_lightning.exceptions import AgentLightningError, InvalidConfigError
from agent_lightning.pool import Pool
from agent_lightning.progress import JobProgress
from lightning_jax import command_line, config_models, heap, memory, processes
from lightning_jax import config as config_lib
from lightning_jax.model import weights
from lightning_jax.policies import Policies
from lightning_jax.server import app as server_app
from lightning_jax.server.control import JobRunner
from lightning_jax.store import ENDED_JOB, DataError, Store

DATA_ID = "config"  # the dataset and the jobs that a config's own files and agent make
JOB_IDS = {"train": "train", "evaluate": "evaluate"}
# What may differ from the run that a work directory holds without making it another run.
_FREE_SETTINGS = ("agent.nworkers", "device", "mode", "runtime.epochs", "runtime.total_steps", "workdir")
_FREE_SECTIONS = ("distributed.", "logging.", "server.")
_FREE_OF_MODELS = (".tensor_parallel", ".fsdp")  # checkpoints go on on any mesh


def main(argv: list[str]) -> int:
    """Returns the process's exit status."""
    if len(argv) > 1:
        raise InvalidConfigError(f"unexpected arguments: {' '.join(argv[1:])}", hint="settings are --config.KEY=VALUE")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # absl's default shows every HTTP request
    config = command_line.merged_config()
    for own in config_models.of_each(config).values():
        weights.model_folder(own.model.path)
    if config.mode != "plan":
        check_workdir(config)
    team, status = start_jax(config), 0
    try:
        if team is not None:
            check_team(config)
        if isinstance(team, processes.Follower):
            follow(config, team)
        elif config.mode == "plan":
            show_plan(config)
        elif config.mode == "serve":
            serve(config, team)
        else:
            status = run_agent(config, team)
    except BaseException:
        if team is not None:
            team.close(failed=True)
        raise
    if team is not None:
        team.close()
    return status


# ---------------------------------------------------------------------------------------------------------------------
# Work directory and device
# ---------------------------------------------------------------------------------------------------------------------


def check_workdir(config: ml_collections.ConfigDict) -> None:
    """Looks whether the run can be this one's.

    Raises:
        StoreError: another process uses the work directory.
        InvalidConfigError: it holds a run with other settings.
    """
    workdir = pathlib.Path(config.workdir)
    path = workdir / "config.json"
    if not path.exists():
        return
    if not config.distributed.coordinator:  # else process 0 will say so, which alone is to open it
        open_store(config).close()
    try:
        before = dict(config_lib.flatten(json.loads(path.read_text())))
    except ValueError as error:
        hint = f"choose another with {cli.flag_of('workdir')}, or remove that file to take its run for this one's"
        raise InvalidConfigError(f"{path} is damaged: {error}", hint=hint) from None
    now = dict(config_lib.flatten(config.to_dict()))
    models = {key for key in before.keys() ^ now.keys() if key.startswith("models.")}
    differences = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} here"
        for key in sorted((before.keys() & now.keys()) | models)
        if before.get(key) != now.get(key)
        and key not in _FREE_SETTINGS
        and not key.startswith(_FREE_SECTIONS)
        and not key.endswith(_FREE_OF_MODELS)
    ]
    if differences:
        raise InvalidConfigError(
            f"{workdir} holds a run with other settings: {'; '.join(differences)}",
            hint=f"choose another with {cli.flag_of('workdir')}, or remove that folder",
        )


def check_team(config: ml_collections.ConfigDict) -> None:
    """Looks whether several processes were started as one job.

    Raises:
        InvalidConfigError: their settings or models differ, or they do not share the work directory. In all of them.
    """
    own = (*_FREE_SECTIONS, "agent.", "data.", "workdir", "device")  # process 0 alone uses them, or machines differ
    settings = config_lib.flatten(config.to_dict())
    facts = {key: value for key, value in settings if not (key.startswith(own) or key.endswith(".path"))}
    for name, of_one in config_models.of_each(config).items():
        facts[f"weights of {name}"] = weights.fingerprint(of_one.model.path)
    processes.check_alike(facts)
    if config.mode != "plan":
        processes.check_shared(pathlib.Path(config.workdir))


def open_store(config: ml_collections.ConfigDict) -> Store:
    """The store of the work directory, which is made where missing.

    Raises:
        InvalidConfigError: the folder cannot be written.
    """
    workdir = pathlib.Path(config.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidConfigError(f"workdir {workdir} cannot be made: {error.strerror}") from error
    return Store(workdir / "store.sqlite3")


def start_jax(config: ml_collections.ConfigDict) -> processes.Leader | processes.Follower | None:
    """Chooses the device, keeps compiled programs for the next start, and joins the other processes, if there are."""
    if config.device != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(config.device, config.device))
    # JAX reserves three quarters of a GPU's memory, unless it is told to reserve more; this process has it to itself.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name; both are an error
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")
    if not jax.config.jax_compilation_cache_dir:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lightning_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if config.device in ("auto", "cpu"):
        heap.keep_freed_memory()
    needed = memory.fewest_devices(config)
    simulated = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if needed > 1 and jax.config.jax_num_cpu_devices < 0 and not simulated:
        # So that a configuration for several devices can be tried where there is none. Other platforms ignore it.
        jax.config.update("jax_num_cpu_devices", -(-needed // max(1, config.distributed.num_processes)))
    try:
        team = processes.join(config.distributed)
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where the platform is known and no device is there
        raise InvalidConfigError(
            f"device {config.device!r} cannot be used: {str(error) or 'JAX finds none on this machine'}",
            hint="set LIGHTNING_DEVICE or --config.device to 'auto' or 'cpu'; `agent-lightning doctor` says which "
            "devices and packages there are",
        ) from error
    return team


# ---------------------------------------------------------------------------------------------------------------------
# Modes
# ---------------------------------------------------------------------------------------------------------------------


def follow(config: ml_collections.ConfigDict, follower: processes.Follower) -> None:
    """Does what process 0 does on the devices, until that process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it may reach all processes at once, and process 0 decides
    if config.mode == "plan":
        return follower.follow(None)
    with contextlib.closing(Policies(config)) as policies:
        follower.follow(policies)


def serve(config: ml_collections.ConfigDict, leader: processes.Leader | None) -> None:
    """Serves the model, and trains it for clients, until SIGINT or SIGTERM."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(server_app.bind(config.server.host, config.server.port))
        store = stack.enter_context(contextlib.closing(open_store(config)))
        policies = _start_policies(config, stack, leader)
        runner = JobRunner(policies, store, config, resume=lambda job_id: job_id not in JOB_IDS.values())
        jobs = stack.enter_context(contextlib.closing(runner))
        http = server_app.create_app(config=config, policies=policies, store=store, jobs=jobs)
        _say(f"serving {', '.join(policies)} on {server_app.url_of(sock)} (Ctrl-C ends)")
        # uvicorn shuts down on either signal and then raises it again; both are to unwind this stack.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            server_app.serve(http, sock)


def show_plan(config: ml_collections.ConfigDict) -> None:
    """Prints the devices, and what the configuration needs of their memory.

    Raises:
        InvalidConfigError: the model cannot be read, or it does not fit.
    """
    print(f"  {_devices()}")
    plan = memory.plan(config)
    if plan.limit is None or plan.need.training <= plan.limit:
        plan = plan.compiled()
    print(f"  {plan.paths} on each device:")
    print("\n".join(f"    {line}" for line in plan.table()), flush=True)
    print(f"  {plan.check() or 'everything fits'}")


def run_agent(config: ml_collections.ConfigDict, leader: processes.Leader | None) -> int:
    """Trains or evaluates with the config's agent and tasks, and says how it went.

    Returns:
        The exit status: 130 where Ctrl-C ended it without a result.

    Raises:
        TrainingError: the job failed.
    """
    agent = agent_source.pack_agent(config.agent.script)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(server_app.bind(config.server.host, config.server.port))
        store = stack.enter_context(contextlib.closing(open_store(config)))
        for split, path in (("train", config.data.train_file), ("test", config.data.test_file)):
            if not path:
                continue
            try:
                store.put_dataset(DATA_ID, split, _read_chunks(path))
            except DataError as error:
                raise error.within(path) from None
        policies = _start_policies(config, stack, leader)
        for name, policy in policies.items():
            if policy.tokenizer.chat_template is None:
                raise InvalidConfigError(
                    f"the tokenizer of {name} has no chat template, so agents cannot talk to the model",
                    hint="choose an instruct model, or add chat_template.jinja to its folder",
                )
        job_id = JOB_IDS[config.mode]
        runner = JobRunner(policies, store, config, resume=lambda known: known == job_id)
        jobs = stack.enter_context(contextlib.closing(runner))
        http = server_app.create_app(config=config, policies=policies, store=store, jobs=jobs)
        server = server_app.RunningServer(http, sock)
        stack.callback(server.stop)
        jobs.submit({"kind": config.mode, "data_id": DATA_ID}, job_id)
        job = _follow(store, jobs, job_id, server.url, agent, config)
    if job["status"] == "failed":
        raise results.job_error(job)
    if not job["result"]:
        return 128 + signal.SIGINT
    _say(_summary(config, job["result"]))
    return 0


def _devices() -> str:
    """The devices, and the memory of one."""
    devices = jax.local_devices()
    limit = memory.device_bytes()
    text = devices[0].device_kind if len(devices) == 1 else f"{len(devices)} devices ({devices[0].device_kind})"
    if limit is None:
        return text
    return f"{text} with {memory.in_bytes(limit)}{'' if len(devices) == 1 else ' each'}"


def _start_policies(
    config: ml_collections.ConfigDict, stack: contextlib.ExitStack, leader: processes.Leader | None
) -> Policies:
    """Loads the models and compiles their samplers, with a bar."""
    from rich.console import Console
    from rich.progress import Progress

    plan = memory.plan(config)
    _say(f"loading {plan.paths} on {_devices()}: {plan.summary()}")
    if warning := plan.check():
        _say(warning)
    if jax.default_backend() == "cpu" and len(jax.local_devices()) > 1:
        _say("the devices are parts of one CPU: good for trying a configuration; 1 is many times faster")
    policies = stack.enter_context(contextlib.closing(Policies(config, leader)))
    if policies.restored is not None:
        _check_order(config, list(policies.restored.get("origins", policies)), list(policies))
        _say(f"continuing behind step {policies.step} of {config.workdir}")
    console = Console(file=sys.stderr, force_terminal=sys.stderr.isatty())  # notebooks set FORCE_COLOR also for a log
    with Progress(console=console, transient=True) as bar:
        for policy in policies.values():
            task = bar.add_task("compiling the sampler", total=None)
            policy.warmup(lambda done, total, task=task: bar.update(task, completed=done, total=total))
    heap.freeze()
    heap.give_back_freed_memory()
    config_lib.save_json(config, pathlib.Path(config.workdir) / "config.json")  # from here on it is this run's folder
    return policies


def _check_order(config: ml_collections.ConfigDict, before: list[str], now: list[str]) -> None:
    """Raises where models have changed places: agents would call another one than they did by the same URL."""
    if len(now) > 1 and before != now:
        raise InvalidConfigError(
            f"{config.workdir} holds a run whose models have another order: {', '.join(before)} there, "
            f"{', '.join(now)} here",
            hint=f"give them in that order, or choose another with {cli.flag_of('workdir')}",
        )


def _follow(store: Store, jobs: JobRunner, job_id: str, url: str, agent: dict, config) -> dict[str, Any]:
    """Runs the job's workers and shows its progress until it has ended; returns the job."""
    failure: list[BaseException] = []
    after = 0
    while seen := store.events(job_id, after):  # of an earlier start
        after = seen[-1]["seq"]
    with JobProgress("training" if config.mode == "train" else "evaluation") as progress:
        nworkers = client.choose_nworkers(config.agent.nworkers, most=config.sampler.max_slots)
        pool = Pool(url, job_id, agent, nworkers, api_key=config.server.api_key or None, on_output=progress.on_output)

        def run_pool() -> None:
            try:
                pool.run(progress.on_status)
            except BaseException as error:  # an agent that cannot be loaded ends the job
                failure.append(error)
                jobs.stop(job_id, now=True)

        workers = threading.Thread(target=run_pool, name="pool")
        workers.start()
        try:
            with _interruptible(jobs, job_id, progress):
                job = _show_until_ended(store, job_id, after, progress)
        except BaseException:
            pool.stop()
            raise
        finally:
            workers.join()
    if failure:
        raise failure[0]
    return job


def _show_until_ended(store: Store, job_id: str, after: int, progress: JobProgress) -> dict[str, Any]:
    while True:
        events = store.events(job_id, after, wait_s=0.5)
        job = store.job(job_id)
        for event in events:
            progress.on_event(event, job)
            after = event["seq"]
        if not events and job["status"] in ENDED_JOB:
            return job


@contextlib.contextmanager
def _interruptible(jobs: JobRunner, job_id: str, progress: JobProgress):
    """Ctrl-C once ends the job after its step, twice at once."""
    asked = threading.Event()

    def stop(now: bool) -> None:
        progress.say("stopping now" if now else "stopping after this step; press Ctrl-C again to stop at once")
        jobs.stop(job_id, now=now)

    def on_interrupt(*_) -> None:
        # In a thread, since the handler may have interrupted somebody who holds a lock that it would wait for.
        threading.Thread(target=stop, args=(asked.is_set(),), daemon=True).start()
        asked.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _summary(config: ml_collections.ConfigDict, result: dict[str, Any]) -> str:
    if config.mode == "evaluate":
        return (
            f"held-out reward {result['reward']:.3f} +- {result['standard_error']:.3f} "
            f"({result['count']} tasks, {result['failed']} failed) at step {result['step']}"
        )
    lines = [f"{result['total_steps']} steps in {result['total_time']:.0f} s"]
    if result["eval_reward_before"] is not None:
        before, after = result["eval_reward_before"], result["eval_reward_after"]
        lines.append(f"held-out reward             {before:.3f} before, {after:.3f} after")
    difference = result["sampler_learner_logprob_diff"]
    compared = "nothing compared" if difference is None else f"{difference:.1e} (mean |log-prob|)"
    lines += [
        f"sampler/learner difference  {compared}",
        f"sampled                     {result['tokens_per_s']:,.0f} tokens/s",
        f"checkpoint                  {result['checkpoints'][-1] if result['checkpoints'] else 'none'}",
        f"curves                      {pathlib.Path(config.workdir) / 'metrics.jsonl'}",
    ]
    return "\n".join(lines)


def _read_chunks(path: str):
    try:
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                yield chunk
    except OSError as error:
        raise InvalidConfigError(f"cannot read the tasks in {path}: {error.strerror}") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run() -> None:
    command_line.define_flags()
    try:
        app.run(main, flags_parser=command_line.parse_flags)
    except AgentLightningError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    _run()
