"""The comparison with other libraries: both sides of decoding run, and what a step is compared by."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("reasoning_gym")
    return runpy.run_path(str(ROOT / "scripts" / "bench_peers.py"))


def test_decoding_beside_transformers():
    pytest.importorskip("torch")
    flags = "--peer=transformers --model=builtin:tiny --batch=3 --prompt=10 --new=5 --repeats=2".split()
    command = [sys.executable, "scripts/bench_peers.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (line,) = result["batches"]
    assert line["ratio"] == pytest.approx(line["tokens_per_s"] / line["peer_tokens_per_s"])
    assert line["tokens_per_s"] == pytest.approx(15 / np.mean(result["seconds"]["3"][1:]))
    assert len(result["peer_seconds"]["3"]) == 3 and len(result["sgemm_flops_per_s"]) == 3
    for peak in (result["peak_memory_bytes"], result["peer_peak_memory_bytes"]):
        assert 2e8 < peak < 5e9  # neither framework is smaller when it is imported


def test_peak_memory_counts_children(script):
    """A child that fills 400 MB beside its parent's own 100 MB, shares them with its own, and frees them at the end."""
    child = "import os, time; x = b'x' * 400_000_000; os.fork(); time.sleep(2); del x; time.sleep(1)"
    parent = f"import subprocess, sys; y = b'y' * 100_000_000; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent]) as process, script["PeakMemory"](process.pid) as memory:
        assert process.wait() == 0
    assert 5e8 < memory.peak_bytes < 6e8


def test_peer_gets_the_tasks_in_the_order_of_our_steps(script, tmp_path):
    script["write_tasks"](tmp_path, 6, {"max_tokens": 4})
    written = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    ordered = script["tasks_in_order"](tmp_path, 2)
    assert sorted(map(json.dumps, ordered)) == sorted(map(json.dumps, written)) and ordered != written
    assert all(task["request"] == {"max_tokens": 4} for task in ordered)


def test_rewards_are_compared_in_pairs(script):
    """By hand: differences 1, 0, 0, -1 have mean 0, deviation sqrt(2/3) and standard error sqrt(1/6)."""
    compared = script["compare_rewards"]([1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.5, 1.0])
    assert compared["difference"] == 0 and compared["standard_error"] == pytest.approx(math.sqrt(1 / 6))
    assert compared["second_half_mean"] == 0.25 and compared["peer_second_half_mean"] == 0.75
