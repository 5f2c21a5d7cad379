"""The benchmark of the HTTP side runs, and measures both sides."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_one_json_line_per_measurement():
    flags = ("--concurrency=8", "--requests=16", "--new=3", "--max_seq_len=64", "--repeats=1")
    done = subprocess.run(
        [sys.executable, "scripts/bench_http.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["stream"] for line in lines] == [False, True]
    for line in lines:
        ratio = line["http_tokens_per_s"] / line["engine_tokens_per_s"]
        assert line["fraction_of_engine"] == pytest.approx(ratio) and ratio > 0
        assert 0 < line["latency_median_s"] <= line["latency_p99_s"]
