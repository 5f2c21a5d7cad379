"""Draws the reward curves of runs: held-out reward as lines, training reward behind it.

python scripts/plot_curve.py runs/quickstart-seed* --control runs/control --output docs/quickstart.png
"""

import argparse
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lightning_jax import metrics

COLOURS = ("#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def draw(workdirs: list[pathlib.Path], controls: list[pathlib.Path], output: pathlib.Path, title: str) -> None:
    """Writes the picture; a work directory's name labels its curve."""
    figure, axes = plt.subplots(figsize=(8, 4.2), dpi=120)
    for i, workdir in enumerate([*workdirs, *controls]):
        is_control = workdir in controls
        colour = "#888888" if is_control else COLOURS[i % len(COLOURS)]
        rows = metrics.read_metrics(workdir)
        if not rows:
            sys.exit(f"error: no metrics in {workdir}")
        train = [(row["step"], row["reward/mean"]) for row in rows if row.get("reward/mean") is not None]
        held_out = [(row["step"], row["eval/reward"]) for row in rows if row.get("eval/reward") is not None]
        axes.plot(*zip(*train, strict=True), color=colour, alpha=0.3, linewidth=1)
        axes.plot(
            *zip(*held_out, strict=True),
            color=colour,
            marker="o",
            markersize=4,
            linestyle="--" if is_control else "-",
            label=f"{workdir.name}: rewards shuffled" if is_control else workdir.name,
        )
    axes.set(xlabel="update", ylabel="reward", ylim=(-0.02, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", fontsize=8)
    axes.text(0.01, 0.02, "thick: held-out, greedy; thin: training, sampled", transform=axes.transAxes, fontsize=8)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the reward curves of runs.")
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--control", action="append", type=pathlib.Path, default=[], help="drawn in grey")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/quickstart.png"))
    parser.add_argument("--title", default="builtin:tiny learns to carry (GRPO)")
    arguments = parser.parse_args()
    draw(arguments.workdirs, arguments.control, arguments.output, arguments.title)


if __name__ == "__main__":
    main()
