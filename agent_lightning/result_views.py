"""Results to look at: figures, and tables in a notebook."""

import html
import math
import re

from agent_lightning.types import EvalResult, TrainingResult

_WIDTH, _HEIGHT, _MARGIN = 360, 96, 6  # of the curves in a notebook, in pixels
_TRAIN_COLOUR, _TEST_COLOUR = "#8da0cb", "#d95f02"


def figure(result: TrainingResult):
    """Both reward curves as a matplotlib figure, which a notebook shows once."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("TrainingResult.plot() needs matplotlib: pip install matplotlib") from error
    drawn, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (steps, rewards), label, style in zip(
        _curves(result),
        ("training (each update)", "held out"),
        ({"color": _TRAIN_COLOUR, "linewidth": 1}, {"color": _TEST_COLOUR, "linewidth": 2, "marker": "o"}),
        strict=True,
    ):
        if rewards:
            axes.plot(steps, rewards, label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    if "inline" in plt.get_backend():  # it would show every open figure of its own accord, and this one twice
        plt.close(drawn)
    return drawn


def training_html(result: TrainingResult) -> str:
    """A table of a training result with its curves."""
    rows = {
        "final reward": _number(result.final_reward),
        "held-out reward": _ends(result.test_rewards),
        "training reward": _ends(result.train_rewards),
        "steps": f"{result.total_steps}",
        "failed rollouts": _failures(result),
        "time": f"{result.total_time:.1f} s",
        "best checkpoint": result.best_checkpoint or "none",
        "last checkpoint": result.checkpoints[-1] if result.checkpoints else "none",
    }
    return f"<div><b>TrainingResult</b>{_svg(result)}{_table(rows)}</div>"


def evaluation_html(result: EvalResult) -> str:
    """A table of an evaluation's result."""
    rows = {
        "mean reward": f"{_number(result.mean)} \u00b1 {_number(result.standard_error)}",
        **{f"pass@{k}": _number(value) for k, value in result.pass_at_k.items() if k & (k - 1) == 0},
        "tasks": f"{len(result.rewards)}",
        "failed rollouts": _failures(result),
        "weights": result.checkpoint or f"step {result.step}",
        "time": f"{result.total_time:.1f} s",
    }
    return f"<div><b>EvalResult</b>{_table(rows)}</div>"


def _curves(result: TrainingResult) -> list[tuple[list[int], list[float]]]:
    """(steps, rewards) of the updates and of the evaluations; they begin at the model's step before the job."""
    first = 0
    if result.test_steps:
        first = result.test_steps[0]
    elif result.checkpoints and (last := re.search(r"step-(\d+)$", result.checkpoints[-1])):
        first = int(last[1]) - result.total_steps  # there is a checkpoint after the last update
    return [
        ([first + i + 1 for i in range(len(result.train_rewards))], result.train_rewards),
        (result.test_steps, result.test_rewards),
    ]


def _svg(result: TrainingResult) -> str:
    """Both curves, without axes; their numbers are in the table."""
    curves = [[(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)] for xs, ys in _curves(result)]
    points = [point for curve in curves for point in curve]
    if len(points) < 2:
        return ""
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))

    def place(x: float, y: float) -> str:
        across = (x - left) / ((right - left) or 1) * (_WIDTH - 2 * _MARGIN) + _MARGIN
        down = (high - y) / ((high - low) or 1) * (_HEIGHT - 2 * _MARGIN) + _MARGIN
        return f"{across:.1f},{down:.1f}"

    lines = [
        f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(place(*p) for p in curve)}"/>'
        for curve, colour in zip(curves, (_TRAIN_COLOUR, _TEST_COLOUR), strict=True)
        if curve
    ]
    return f'<br/><svg width="{_WIDTH}" height="{_HEIGHT}" role="img">{"".join(lines)}</svg>'


def _table(rows: dict[str, str]) -> str:
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
    return f"<table>{cells}</table>"


def _ends(rewards: list[float]) -> str:
    return f"{_number(rewards[0])} \u2192 {_number(rewards[-1])} ({len(rewards)})" if rewards else "none"


def _failures(result: TrainingResult | EvalResult) -> str:
    first = f"; the first: {result.first_failure}" if result.first_failure else ""
    return f"{result.failures}{first}"


def _number(value: float) -> str:
    return f"{value:.4g}"
