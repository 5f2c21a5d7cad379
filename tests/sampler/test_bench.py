"""The benchmark script: its line, and the sizes that its limits come from."""

import json
import pathlib
import runpy
import sys

import pytest

from lightning_jax.model import shapes

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "bench_sampler.py"


def test_one_json_line_per_measurement(monkeypatch, capsys):
    options = "--model=random:tiny --batch=2,3 --prompt=10 --new=5 --slots=4 --repeats=1 --prefill_chunk=16"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options.split()])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["batch"] for line in lines] == [2, 3]
    for line in lines:
        assert line["backend"] == "cpu" and line["prompt_tokens"] == 10 and line["new_tokens"] == 5
        assert line["tokens_per_s"] == pytest.approx(line["batch"] * 5 / line["total_s"])
        assert "plain_tokens_per_s" not in line and line["prefill_work"] == 1.0
        assert 0 < line["prefill_s"] and 1e8 < line["bandwidth_bytes_per_s"] < 1e13


def test_mixed_lengths_and_top_p_are_measured_beside_neither(monkeypatch, capsys):
    options = "--batch=4 --group=2 --prompt=10 --shortest=2 --new=8 --top_p=0.9 --repeats=1 --prefill_chunk=16"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--model=random:tiny", *options.split()])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    line = json.loads(capsys.readouterr().out)
    assert line["tokens_per_s"] == pytest.approx((2 + 4 + 6 + 8) / line["total_s"])
    assert line["fraction_of_plain"] == pytest.approx(line["tokens_per_s"] / line["plain_tokens_per_s"])
    assert line["prefill_work"] == 1.0  # the second of each pair finds the prompt computed
    assert 0 < line["publish_s"] and 0 < line["publish_limit_s"]


def test_bytes_that_a_step_reads():
    """Llama 3.2 1B has 1,235,814,400 parameters (its model card says 1.23B), 16 layers of 8 KV heads of 64."""
    script = runpy.run_path(str(SCRIPT))
    config = shapes.named_shape("llama3.2-1b")
    assert script["weight_bytes"](config, "bfloat16") == 2 * 1_235_814_400
    assert script["kv_bytes"](config, 1, "bfloat16") == 2 * 16 * 8 * 64 * 2
