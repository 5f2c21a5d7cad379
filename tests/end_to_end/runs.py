"""Starts the program as a user would, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(workdir: Path, *flags: str, config: str = "configs/quickstart.py") -> list[str]:
    settings = (f"--config.workdir={workdir}", "--config.logging.tensorboard=false", *flags)
    return [sys.executable, "-m", "lightning_jax.main", f"--config={config}", *settings]


def run(workdir: Path, *flags: str, timeout_s: float = 550, **options) -> subprocess.CompletedProcess:
    """Runs to the end; what it printed is in `stderr`."""
    return subprocess.run(
        command(workdir, *flags, **options), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )


def finished(workdir: Path, *flags: str, **options) -> dict:
    """Runs to a good end and returns `result.json`."""
    done = run(workdir, *flags, **options)
    assert done.returncode == 0, done.stderr
    return json.loads((workdir / "result.json").read_text())


def run_until_killed(workdir: Path, *flags: str, at_step: int, timeout_s: float = 300) -> None:
    """Kills the program, and it alone, with SIGKILL as soon as `metrics.jsonl` shows a step."""
    with open(workdir.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command(workdir, *flags), cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + timeout_s
        try:
            while not any(row["step"] >= at_step for row in metrics(workdir)):
                assert process.poll() is None, workdir.with_suffix(".log").read_text()
                assert time.monotonic() < deadline, "the run takes too long to reach the step"
                time.sleep(0.02)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()


def metrics(workdir: Path) -> list[dict]:
    """The whole lines of `metrics.jsonl`."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
