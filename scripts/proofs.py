"""Does each algorithm learn, and only from rewards that mean something? Runs them, then draws and tabulates.

    python scripts/proofs.py                                # everything: about an hour on 2 cores
    python scripts/proofs.py --only=grpo,tool --seeds=0     # some of it; what ran before is kept and in the table

A proof is a configuration, run once a seed, and once more as a control with `algorithm.shuffle_rewards`, which gives
each rollout another one's reward. Every run is `lightning_jax.main` with real workers, as a user starts it. What was
not done when this was interrupted is run when it is started again. Held-out rewards come from `result.json`.

Ends with status 1 if a seed gained less than `LEAST_GAIN`, or a control more than `MOST_OF_CONTROL` of what the least
seed did. Not every control stands still: it is pushed about at random, and from a reward of 0 that can only help.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lightning_jax import metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
LEAST_GAIN, MOST_OF_CONTROL = 0.2, 0.25
CONTROL = "control"


@dataclasses.dataclass(frozen=True)
class Proof:
    """What is run, and what the table calls it."""

    title: str
    config: str
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def _quickstart(title: str, *flags: str, updates: int = 24) -> Proof:
    return Proof(title, "configs/quickstart.py", (f"runtime.total_steps={updates}", "runtime.eval_interval=6", *flags))


def _ppo(title: str, *flags: str, updates: int = 24, environment: tuple[tuple[str, str], ...] = ()) -> Proof:
    flags = (f"runtime.total_steps={updates}", "runtime.eval_interval=6", *flags)
    return Proof(title, "configs/ppo.py", flags, environment)


_TOOL = (
    "agent.script=scripts/agents/book.py",
    *(f"data.{s}_file=scripts/agents/data/lookup_{s}.jsonl" for s in ("train", "test")),
)
_AIR = (("LIGHTNING_ENABLE_AIR", "true"),)
PROOFS = {
    "grpo": _quickstart("GRPO, the quickstart", updates=48),
    "rloo": _quickstart("RLOO", "algorithm.name=rloo", "algorithm.learning_rate=1e-4"),
    "reinforce++": _quickstart("REINFORCE++", "algorithm.name=reinforce++"),
    "reinforce++-baseline": _quickstart("REINFORCE++ with the group's baseline", "algorithm.name=reinforce++-baseline"),
    "ppo": _ppo("PPO"),
    "lora": _quickstart("GRPO, LoRA of rank 16", "model.lora_rank=16", "algorithm.learning_rate=2e-3"),
    "tool": _quickstart("GRPO, an agent of two turns with a tool", *_TOOL, updates=12),
    "air": _ppo("PPO, that agent with AIR's rewards", *_TOOL, updates=12, environment=_AIR),
    "two_models": Proof(
        "GRPO, two models jointly", "configs/two_models.py", ("runtime.total_steps=6", "runtime.eval_interval=2")
    ),
}


def main() -> None:
    args = _parse_args()
    for name in args.only:
        for run in [*args.seeds, CONTROL]:
            _run(PROOFS[name], args.runs / name / run)
    found = {name: results for name in PROOFS if (results := _results(args.runs / name))}
    _draw(found, args.runs, args.docs / "proofs.png")
    (args.docs / "proofs.md").write_text(_page(found))
    print(_table(found))
    failed = [name for name in args.only if not _holds(found[name])]
    if failed:
        sys.exit(f"did not hold: {', '.join(failed)}")


def _run(proof: Proof, workdir: pathlib.Path) -> None:
    """Runs a proof with the seed, or as the control, that the work directory's name says; not again if it is done."""
    if (workdir / "result.json").exists():
        return
    is_control = workdir.name == CONTROL
    flags = (
        f"workdir={workdir}",
        f"seed={0 if is_control else workdir.name}",
        "runtime.checkpoint_interval=0",
        "logging.tensorboard=false",
        f"algorithm.shuffle_rewards={is_control}",
        *proof.flags,
    )
    command = [sys.executable, "-m", "lightning_jax.main", f"--config={proof.config}"]
    workdir.mkdir(parents=True, exist_ok=True)
    print(f"{workdir} ...", flush=True)
    with open(workdir / "output.log", "w") as log:
        environment = os.environ | dict(proof.environment)
        done = subprocess.run(
            [*command, *(f"--config.{flag}" for flag in flags)], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    if done.returncode:
        raise SystemExit(f"{workdir} failed:\n{(workdir / 'output.log').read_text()[-3000:]}")


def _results(folder: pathlib.Path) -> dict[str, dict]:
    """`result.json` of each run of a proof, by the run's name; the control last."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))}


def _gain(result: dict) -> float:
    return result["eval_reward_after"] - result["eval_reward_before"]


def _holds(results: dict[str, dict]) -> bool:
    gains = {run: _gain(result) for run, result in results.items()}
    control = gains.pop(CONTROL)
    least = min(gains.values())
    return least >= LEAST_GAIN and control <= MOST_OF_CONTROL * least


# ---- what is shown ----


def _table(found: dict[str, dict[str, dict]]) -> str:
    lines = ["| | updates | before | after, seeds 0, 1, ... | control, after |", "|---|---|---|---|---|"]
    for name, results in found.items():
        seeds = [result for run, result in results.items() if run != CONTROL]
        after = ", ".join(f"{result['eval_reward_after']:.3f}" for result in seeds)
        control = f"{results[CONTROL]['eval_reward_after']:.3f}" if CONTROL in results else "not run"
        any_run = next(iter(results.values()))
        before = f"{any_run['eval_reward_before']:.3f}"
        lines.append(f"| {PROOFS[name].title} | {any_run['total_steps']} | {before} | {after} | {control} |")
    return "\n".join(lines)


def _page(found: dict[str, dict[str, dict]]) -> str:
    return f"""# What learns

Held-out reward, greedy, before and after some updates of `builtin:tiny` with real agents. In the control every rollout
gets another one's reward of the same step: whatever is still gained then does not come from the rewards. A control is
pushed about at random, which from a reward of 0 can only help. The figures are `python scripts/proofs.py`'s, which
fails if a seed gains less than {LEAST_GAIN}, or a control more than {MOST_OF_CONTROL:.0%} of what the least seed does.

{_table(found)}

![held-out rewards over updates, a panel for each](proofs.png)

The agent with a tool and the two models have a task that takes two right answers in a row, all of them with a carry.
With AIR the tool's success earns 0.3 more in training, and its failure 0.2 less.
"""


def _draw(found: dict[str, dict[str, dict]], runs: pathlib.Path, output: pathlib.Path) -> None:
    columns = 3
    rows = -(-len(found) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(10, 2.6 * rows), dpi=110, squeeze=False)
    for panel in panels.flat[len(found) :]:
        panel.remove()
    for panel, (name, results) in zip(panels.flat, found.items(), strict=False):
        for run in results:
            curve = [
                (r["step"], r["eval/reward"]) for r in metrics.read_metrics(runs / name / run) if "eval/reward" in r
            ]
            style = {"color": "#888888", "linestyle": "--"} if run == CONTROL else {}
            panel.plot(*zip(*curve, strict=True), marker="o", markersize=3, **style)
        panel.set_title(PROOFS[name].title, fontsize=8)
        panel.grid(alpha=0.3)
    figure.supxlabel("update", fontsize=8)
    figure.supylabel("held-out reward; dashed: rewards shuffled", fontsize=8)
    figure.tight_layout()
    figure.savefig(output)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PROOFS), help="names, by commas")
    parser.add_argument("--seeds", type=lambda text: text.split(","), default=["0", "1", "2"])
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "proofs", help="work directories")
    parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs", help="where the page and picture go")
    args = parser.parse_args()
    args.runs = args.runs.resolve()  # the runs are started in the repository, wherever this was
    if unknown := set(args.only) - set(PROOFS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PROOFS)}")
    return args


if __name__ == "__main__":
    main()
