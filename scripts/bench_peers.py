"""Measures this project beside others on the CPU, one side after the other: prints one JSON object with their ratios.

    python scripts/bench_peers.py --peer=transformers --peer-python=PEER/bin/python --model=models/smollm2.gguf
    python scripts/bench_peers.py --peer=trl --peer-python=PEER/bin/python --model=models/smollm2.gguf
    python scripts/bench_peers.py --peer=trl ... --until-eos --steps=20 --prompts=2 --new=24   # do both learn the same?
    python scripts/bench_peers.py --peer=trl ... --peer-checkpointing                           # as TRL has by default
    python scripts/bench_peers.py --peer=tunix --peer-python=PEER/bin/python --model=models/smollm2.gguf

`transformers` is decoding alone: `--batch` requests of random prompts at once, each with `--new` tokens. On our side a
client process sends them to the server over HTTP; on the peer's, `generate` gets the whole batch. `trl` and `tunix` are
a whole GRPO step: `--prompts` sums of two digits from reasoning-gym x `--group` rollouts, rewards, the reference's
log-probs, and one update of all rows at once. On our side that is `lightning_jax.main` with
`scripts/agents/reasoning.py` in a worker for each rollout; on the peer's, TRL's GRPOTrainer or Tunix's GRPOLearner with
the same tasks, prompts, reward function and settings.

The peer runs in an environment of its own, which has it and, for a whole step, reasoning-gym and httpx (`pip install
trl reasoning-gym httpx`, or `pip install google-tunix jax reasoning-gym httpx`). Both sides read the same Hugging Face
folder, which is made from `--model`, and compute in float32. The first measurement of each side is a warm-up and does
not count; figures are medians of the others.

Peak memory is the largest sum of what a side's processes hold in memory, from Linux's /proc: of the first one, seen
five times a second, and of those that it started, as often as takes a hundredth of the time. Of pages that several of
these share, each counts its part. `sgemm_flops_per_s` is a product of large matrices by NumPy before, between and after
the sides: how fast the machine was meanwhile.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import httpx
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent / "agents"))

import reasoning

from lightning_jax import data
from lightning_jax.model import export, weights
from lightning_jax.store import Store
from lightning_jax.text import tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
SEED = 0
_START_S = 300.0  # for the server to compile its programs


def main() -> None:
    args = _parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        config, params = weights.load_arrays(args.model)
        export.save_hf(folder / "model", config, params)
        tokenizer.load_tokenizer(args.model).save(folder / "model")
        del params
        compared = compare_decoding if args.peer == "transformers" else compare_steps
        result = compared(args, folder, config.vocab_size)
    heading = {
        "benchmark": "peers",
        "peer": args.peer,
        "date": datetime.date.today().isoformat(),
        "model": args.model,
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
        "peer_environment": args.peer_env,
    }
    print(json.dumps(heading | result))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: ours through HTTP, Hugging Face's `generate`
# ---------------------------------------------------------------------------------------------------------------------


def compare_decoding(args: argparse.Namespace, folder: pathlib.Path, vocab_size: int) -> dict:
    """Tokens per second of both sides, the prompts' prefill included, by batch."""
    speed = [sgemm_flops_per_s()]
    seconds, peak = _our_decoding(args, folder, vocab_size)
    speed.append(sgemm_flops_per_s())
    spec = {
        "model": str(folder / "model"),
        "vocab_size": vocab_size,
        "batches": args.batch,
        "prompt_tokens": args.prompt,
        "new_tokens": args.new,
        "repeats": args.repeats,
    }
    peer, peer_peak = run_peer(args, folder, "transformers_decode.py", spec)
    speed.append(sgemm_flops_per_s())
    batches = []
    for batch in args.batch:
        ours, theirs = (batch * args.new / median(s[1:]) for s in (seconds[batch], peer["seconds"][str(batch)]))
        batches.append({"batch": batch, "tokens_per_s": ours, "peer_tokens_per_s": theirs, "ratio": ours / theirs})
    return {
        "what": "decode",
        "prompt_tokens": args.prompt,
        "new_tokens": args.new,
        "batches": batches,
        "peak_memory_bytes": peak,
        "peer_peak_memory_bytes": peer_peak,
        "seconds": seconds,
        "peer_seconds": peer["seconds"],
        "peer_versions": peer["versions"],
        "peer_threads": peer["threads"],
        "sgemm_flops_per_s": speed,
    }


def _our_decoding(args: argparse.Namespace, folder: pathlib.Path, vocab_size: int) -> tuple[dict, int]:
    """Seconds of each run by batch, and the server's peak memory."""
    length, most = args.prompt + args.new, max(args.batch)
    settings = {
        "mode": "serve",
        "device": "cpu",
        "workdir": str(folder / "serve"),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "runtime": {"max_seq_len": length},
        "sampler": {"max_slots": most, "kv_cache_tokens": _whole_pages(length) * most},
        "server": {"port": 0},
    }
    rng = np.random.default_rng(0)
    seconds = {}
    with _our_program(settings, folder) as (process, output), PeakMemory(process.pid) as memory:
        url = _server_url(process, output)
        for batch in args.batch:
            with httpx.Client(limits=httpx.Limits(max_connections=batch), timeout=600.0) as http:
                seconds[batch] = [_decode_over_http(http, url, rng, batch, vocab_size, args) for _ in range(args.runs)]
        process.send_signal(signal.SIGINT)
        process.wait(60)
    return seconds, memory.peak_bytes


def _decode_over_http(http: httpx.Client, url: str, rng, batch: int, vocab_size: int, args) -> float:
    """Seconds until every one of `batch` requests, sent at once, has its reply."""

    def post(prompt: list[int]) -> int:
        request = {"prompt": prompt, "max_tokens": args.new, "ignore_eos": True, "temperature": 1.0}
        reply = http.post(f"{url}/v1/completions", json=request)
        reply.raise_for_status()
        return reply.json()["usage"]["completion_tokens"]

    prompts = rng.integers(vocab_size, size=(batch, args.prompt)).tolist()
    with concurrent.futures.ThreadPoolExecutor(batch) as pool:
        start = time.perf_counter()
        tokens = sum(pool.map(post, prompts))
        seconds = time.perf_counter() - start
    assert tokens == batch * args.new, f"{tokens} tokens"
    return seconds


# ---------------------------------------------------------------------------------------------------------------------
# A whole GRPO step: ours, TRL's GRPOTrainer, Tunix's GRPOLearner
# ---------------------------------------------------------------------------------------------------------------------


def compare_steps(args: argparse.Namespace, folder: pathlib.Path, vocab_size: int) -> dict:
    """Seconds, peak memory and rewards of both sides' steps."""
    steps = args.steps or args.runs
    write_tasks(folder, steps * args.prompts, {"max_tokens": args.new, "ignore_eos": not args.until_eos})
    speed = [sgemm_flops_per_s()]
    ours = _our_steps(args, folder, steps)
    speed.append(sgemm_flops_per_s())
    spec = {
        "model": str(folder / "model"),
        "folder": str(folder / "peer"),
        "tasks": tasks_in_order(folder, args.prompts),
        "prompts": args.prompts,
        "group": args.group,
        "new_tokens": args.new,
        "ignore_eos": not args.until_eos,
        "checkpointing": args.peer_checkpointing,
        "steps": steps,
        "learning_rate": args.learning_rate,
        "kl_coef": args.kl_coef,
        "seed": SEED,
    }
    peer, peak = run_peer(args, folder, f"{args.peer}_grpo.py", spec)
    peer["peak_memory_bytes"] = peak
    speed.append(sgemm_flops_per_s())
    peer |= {"median_step_s": median(peer["step_s"][1:]), "median_sample_s": median(peer["sample_s"][1:])}
    return {
        "what": "grpo step",
        **{name: spec[name] for name in ("prompts", "group", "new_tokens", "ignore_eos", "learning_rate", "kl_coef")},
        "peer_checkpointing": args.peer_checkpointing,
        "speed_ratio": peer["median_step_s"] / ours["median_step_s"],
        "memory_ratio": ours["peak_memory_bytes"] / peer["peak_memory_bytes"],
        "reward": compare_rewards(ours["reward"], peer["reward"]),
        "ours": ours,
        "peer_result": peer,
        "sgemm_flops_per_s": speed,
    }


def write_tasks(folder: pathlib.Path, count: int, request: dict) -> None:
    """FOLDER/train.jsonl: sums and differences of two digits, each with fields of its request."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    reasoning.write_tasks(folder, "chain_sum", {"train": count}, options)
    file = folder / "train.jsonl"
    tasks = [json.loads(line) | {"request": request} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(task) + "\n" for task in tasks))


def tasks_in_order(folder: pathlib.Path, tasks_per_step: int) -> list[dict]:
    """The tasks in the order in which our side's steps take them."""
    with contextlib.closing(Store(folder / "order.sqlite3")) as store:
        store.put_dataset("tasks", "train", iter([(folder / "train.jsonl").read_bytes()]))
        batches = data.task_batches(store, "tasks", tasks_per_step, 1, SEED)
        return [item.task for batch in batches for item in batch]


def _our_steps(args: argparse.Namespace, folder: pathlib.Path, steps: int) -> dict:
    rollouts = args.prompts * args.group
    length = 128 + args.new  # the longest prompt is far below 128
    settings = {
        "mode": "train",
        "seed": SEED,
        "device": "cpu",
        "workdir": str(folder / "ours"),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "algorithm": {
            "group_size": args.group,
            "learning_rate": args.learning_rate,
            "kl_coef": args.kl_coef,
            "entropy_coef": 0.0,
        },
        "runtime": {
            "max_seq_len": length,
            "batch_size": rollouts,
            "gradient_accumulation": 4,  # half the memory
            "remat": "dots",
            "total_steps": steps,
            "checkpoint_interval": 0,
        },
        "sampler": {"max_slots": rollouts, "kv_cache_tokens": _whole_pages(length) * rollouts},
        "agent": {"script": str(ROOT / "scripts" / "agents" / "reasoning.py"), "nworkers": rollouts},
        "data": {"train_file": str(folder / "train.jsonl")},
        "server": {"port": 0},
        "logging": {"tensorboard": False, "samples_every": 0},
    }
    with _our_program(settings, folder) as (process, output), PeakMemory(process.pid) as memory:
        if process.wait():
            raise SystemExit(f"our side failed:\n{output.read_text()[-3000:]}")
    rows = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    ends = [row["time/total_s"] for row in rows]
    step_s = np.diff([0.0, *ends]).tolist()
    return {
        "median_step_s": median(step_s[1:]),
        "median_sample_s": median([row["time/sample_s"] for row in rows[1:]]),
        "median_train_s": median([row["time/train_s"] for row in rows[1:]]),
        "peak_memory_bytes": memory.peak_bytes,
        "step_s": step_s,
        "reward": [row["reward/mean"] for row in rows],
        "completion_tokens": [row["completion/mean_tokens"] for row in rows],
    }


def compare_rewards(ours: list[float], peer: list[float]) -> dict[str, float]:
    """The steps' mean rewards beside each other; both sides saw the same tasks, so steps are compared in pairs."""
    difference = np.subtract(ours, peer)
    error = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else math.nan
    half = len(ours) // 2
    return {
        "mean": float(np.mean(ours)),
        "peer_mean": float(np.mean(peer)),
        "second_half_mean": float(np.mean(ours[half:])),
        "peer_second_half_mean": float(np.mean(peer[half:])),
        "difference": float(difference.mean()),
        "standard_error": error,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Both
# ---------------------------------------------------------------------------------------------------------------------


def run_peer(args: argparse.Namespace, folder: pathlib.Path, script: str, spec: dict) -> tuple[dict, int]:
    """Runs a file of scripts/peers with the peer's Python; returns its result and its peak memory."""
    spec_file, result_file = folder / "spec.json", folder / "result.json"
    spec_file.write_text(json.dumps(spec))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1"} | dict(setting.split("=", 1) for setting in args.peer_env)
    command = [args.peer_python, ROOT / "scripts" / "peers" / script, spec_file, result_file]
    output = folder / "peer.log"
    with open(output, "w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
        with PeakMemory(process.pid) as memory:
            if process.wait():
                raise SystemExit(f"{script} failed:\n{output.read_text()[-3000:]}")
    return json.loads(result_file.read_text()), memory.peak_bytes


@contextlib.contextmanager
def _our_program(settings: dict, folder: pathlib.Path):
    """Runs `lightning_jax.main`; yields the process and the file with its output."""
    file, output = folder / "settings.yaml", folder / "ours.log"
    file.write_text(json.dumps(settings))  # YAML as well
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lightning_jax.main", f"--server_config={file}"]
    with open(output, "w") as log:
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) as process:
            try:
                yield process, output
            finally:
                process.terminate()


def _server_url(process: subprocess.Popen, output: pathlib.Path) -> str:
    """Where the server listens, as soon as it does."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"serving .* on (http://\S+)", output.read_text()):
            return found[1]
        time.sleep(0.1)
    raise SystemExit(f"our server did not start:\n{output.read_text()[-3000:]}")


class PeakMemory:
    """The most memory that a process and those below it hold together, while the block runs."""

    def __init__(self, pid: int):
        self._pid, self._ended = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak_bytes = 0

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        next_look = 0.0
        while not self._ended.wait(0.2):
            now = time.perf_counter()
            if now >= next_look:  # the system takes milliseconds to tell a process's shared pages
                used = time.thread_time()
                below = sum(_held_bytes(pid, "smaps_rollup", "Pss") for pid in _descendants(self._pid))
                next_look = now + 100 * (time.thread_time() - used)
            self.peak_bytes = max(self.peak_bytes, _held_bytes(self._pid, "status", "VmRSS") + below)


def _held_bytes(pid: int, file: str, field: str) -> int:
    """What a file of /proc/PID says of a process's memory; 0 where there is none."""
    found = re.findall(rf"^{field}:\s+(\d+) kB", _read_proc(f"{pid}/{file}"), re.MULTILINE)
    return sum(1024 * int(kilobytes) for kilobytes in found)


def _descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they did."""
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*")
    children = [int(child) for task in tasks for child in _read_proc(f"{pid}/task/{task.name}/children").split()]
    return children + [below for child in children for below in _descendants(child)]


def _read_proc(path: str) -> str:
    """A file of /proc; empty where its process has ended meanwhile."""
    try:
        return pathlib.Path("/proc", path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def sgemm_flops_per_s(size: int = 2048) -> float:
    """What the best of a few products of large square float32 matrices reaches."""
    a = np.ones((size, size), np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def machine() -> dict:
    names = re.findall(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
    }


def median(values: list[float]) -> float:
    return float(np.median(values))


def _whole_pages(tokens: int, page_size: int = 16) -> int:
    return -(-tokens // page_size) * page_size


def _parse_args() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("transformers", "trl", "tunix"), required=True)
    parser.add_argument("--peer-python", default=sys.executable, help="this environment's by default")
    parser.add_argument(
        "--peer-env", action="append", default=[], help="NAME=VALUE for the peer alone, as LD_PRELOAD=libjemalloc.so.2"
    )
    parser.add_argument("--peer-checkpointing", action="store_true", help="trl: recompute activations, its default")
    parser.add_argument("--model", required=True, help="a model path")
    parser.add_argument("--repeats", type=int, default=3, help="measurements after the warm-up")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--batch", type=numbers, default=[32, 64], help="decode: requests, separated by commas")
    parser.add_argument("--prompt", type=int, default=36, help="decode: prompt tokens of each request")
    parser.add_argument("--prompts", type=int, default=4, help="step: tasks")
    parser.add_argument("--group", type=int, default=8, help="step: rollouts of each task")
    parser.add_argument("--steps", type=int, help="step: updates, one more than --repeats by default")
    parser.add_argument("--until-eos", action="store_true", help="step: replies may end before --new tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--kl-coef", type=float, default=0.001)
    args = parser.parse_args()
    args.runs = 1 + args.repeats
    return args


if __name__ == "__main__":
    main()
