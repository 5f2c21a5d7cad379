"""What scripts/proofs.py makes of finished runs: a page and a picture, and a verdict that can be no."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def proofs():
    spec = importlib.util.spec_from_file_location("proofs", ROOT / "scripts" / "proofs.py")
    sys.modules["proofs"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "after, verdict",
    [
        ({"0": 0.9, "1": 0.8, "2": 0.61, "control": 0.45}, None),
        ({"0": 0.9, "1": 0.8, "2": 0.59, "control": 0.1}, "did not hold: grpo"),
        ({"0": 0.9, "1": 0.8, "2": 0.9, "control": 0.51}, "did not hold: grpo"),
    ],
)
def test_every_seed_must_learn_and_the_control_must_not(proofs, tmp_path, monkeypatch, after, verdict):
    for run, reward in after.items():
        workdir = tmp_path / "runs" / "grpo" / run
        workdir.mkdir(parents=True)
        result = {"eval_reward_before": 0.4, "eval_reward_after": reward, "total_steps": 24}
        (workdir / "result.json").write_text(json.dumps(result))
        rows = [{"step": 0, "eval/reward": 0.4}, {"step": 12}, {"step": 24, "eval/reward": reward}]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "docs").mkdir()
    flags = ["--only=grpo", f"--runs={tmp_path / 'runs'}", f"--docs={tmp_path / 'docs'}"]
    monkeypatch.setattr(sys, "argv", ["proofs.py", *flags])
    if verdict is None:
        proofs.main()
    else:
        with pytest.raises(SystemExit, match=verdict):
            proofs.main()
    seeds = ", ".join(f"{after[seed]:.3f}" for seed in "012")
    row = f"| GRPO, the quickstart | 24 | 0.400 | {seeds} | {after['control']:.3f} |"
    assert row in (tmp_path / "docs" / "proofs.md").read_text()
    assert (tmp_path / "docs" / "proofs.png").read_bytes().startswith(b"\x89PNG")
